package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// As a child of a test this binary is the command itself, or a client that knows only an
// address.
func TestMain(m *testing.M) {
	switch os.Getenv("CONNPOOL_TEST_AS") {
	case "command":
		if n := os.Getenv("CONNPOOL_TEST_FILES"); n != "" {
			limitFiles(n)
		}
		main()
	case "clients":
		os.Exit(beClients(os.Args[1], os.Args[2]))
	default:
		// The parallel ones among these tests wait for processes and for time-outs.
		flag.Set("test.parallel", "8")
		os.Exit(m.Run())
	}
}

// beClients has ten conversations in turn, each over a connection of its own, and
// checks every reply.
func beClients(network, addr string) int {
	for i := range 10 {
		nc, err := net.Dial(network, addr)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		nc.SetDeadline(time.Now().Add(time.Minute))
		r := bufio.NewReader(nc)
		for j := range 5 {
			token := fmt.Sprintf("p%d.%d.%d", os.Getpid(), i, j)
			fmt.Fprintf(nc, "%s\n", token)
			line, err := r.ReadString('\n')
			if err != nil || !strings.HasSuffix(line, " "+token+"\n") {
				fmt.Fprintf(os.Stderr, "to %s came %q, %v\n", token, line, err)
				return 1
			}
		}
		nc.Close()
	}
	return 0
}

// child is the command as a process of its own.
type child struct {
	*exec.Cmd
	t    *testing.T
	at   string // the address it listens on, as package net takes it
	mu   sync.Mutex
	text bytes.Buffer // its output on stderr
	out  bytes.Buffer
	left chan error
}

func (c *child) said() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

func startGateway(t *testing.T, args ...string) *child {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("this system has no signals that a process could send to another")
	}
	c := &child{t: t, left: make(chan error, 1)}
	c.Cmd = exec.Command(os.Args[0], append([]string{"gateway"}, args...)...)
	c.Env = append(os.Environ(), "CONNPOOL_TEST_AS=command")
	c.Stdout = &c.out
	stderr, err := c.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, c.Start())
	t.Cleanup(func() { c.Process.Kill(); <-c.left })
	listening := make(chan string, 1)
	go func() {
		r := bufio.NewReader(stderr)
		for {
			line, err := r.ReadString('\n')
			c.mu.Lock()
			c.text.WriteString(line)
			c.mu.Unlock()
			if _, after, ok := strings.Cut(line, "msg=listening at="); ok {
				at, _, _ := strings.Cut(after, " ")
				listening <- at
			}
			if err != nil {
				err := c.Wait()
				c.left <- err
				close(c.left)
				return
			}
		}
	}()
	select {
	case at := <-listening:
		for _, scheme := range []string{"tcp://", "tls://", "unix:"} {
			at = strings.TrimPrefix(at, scheme)
		}
		c.at = at
	case <-time.After(time.Minute):
		t.Fatalf("it does not listen:\n%s", c.said())
	}
	return c
}

// ended waits for the process and returns its status.
func (c *child) ended() int {
	c.t.Helper()
	select {
	case <-c.left:
		return c.ProcessState.ExitCode()
	case <-time.After(time.Minute):
		c.t.Fatalf("it does not end:\n%s", c.said())
		return 0
	}
}

// PLT-07, PLT-11, PLT-14: three client processes with thirty sessions in turn, a gateway
// in a process of its own, and a server that never sees more connections than the
// gateway's limit.
func TestClientsAndGatewayAreSeparateProcesses(t *testing.T) {
	t.Parallel()
	srv, err := faultnet.Start(faultnet.Options{})
	require.NoError(t, err)
	defer srv.Close()
	g := startGateway(t, "-framing", "line", "-listen", "tcp://127.0.0.1:0", "-to", fmt.Sprintf("tcp://127.0.0.1:%d", srv.Port()), "-max-open", "2")
	var wg tasks.Group
	for range 3 {
		wg.Go(func() {
			cmd := exec.Command(os.Args[0], "tcp", g.at)
			cmd.Env = append(os.Environ(), "CONNPOOL_TEST_AS=clients")
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	wg.Wait()
	require.LessOrEqual(t, srv.Accepts(), 2)
	g.Process.Signal(syscall.SIGTERM)
	require.Equal(t, exitOK, g.ended(), g.said())
	require.Contains(t, g.out.String(), "30 clients, 150 requests, 150 replies")
}

func TestCtrlCLeavesNoSocketBehind(t *testing.T) {
	srv, err := faultnet.Start(faultnet.Options{ReplyDelay: func(int, int) time.Duration { return time.Minute }})
	require.NoError(t, err)
	defer srv.Close()
	for _, signals := range []int{1, 2} {
		dir, err := os.MkdirTemp("", "gw")
		require.NoError(t, err)
		t.Cleanup(func() { os.RemoveAll(dir) })
		g := startGateway(t, "-framing", "line", "-listen", "unix:"+dir+"/s", "-status", "unix:"+dir+"/t",
			"-to", fmt.Sprintf("tcp://127.0.0.1:%d", srv.Port()), "-drain", "1m")
		nc, err := net.Dial("unix", g.at)
		require.NoError(t, err)
		defer nc.Close()
		if signals == 2 { // a request is under way, and the gateway does not wait for it
			before := srv.Accepts()
			io.WriteString(nc, "slow\n")
			require.True(t, eventually(time.Minute, func() bool { return srv.Accepts() > before }))
		}
		g.Process.Signal(os.Interrupt)
		if signals == 2 {
			require.True(t, eventually(time.Minute, func() bool { return strings.Contains(g.said(), "draining") }))
			g.Process.Signal(os.Interrupt)
			require.Equal(t, exitBroken, g.ended(), "it says that it cut something off")
			require.Contains(t, g.said(), "1 clients were cut off")
		} else {
			require.Equal(t, exitOK, g.ended(), g.said())
		}
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

// lockedBuffer is a buffer for several goroutines.
type lockedBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// gatewayRun runs the command in this process; only for runs that end by themselves.
func gatewayRun(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out bytes.Buffer
	var errs lockedBuffer // the log writes to it, too
	status = run(ctx, append([]string{"gateway"}, args...), &out, &errs)
	return status, out.String(), errs.String()
}

func TestGatewayHelpTeaches(t *testing.T) {
	status, out, errs := gatewayRun(t, "-h")
	require.Equal(t, exitOK, status)
	require.Empty(t, errs)
	for _, part := range []string{"usage: connpool gateway", "resp", "modbus", "session", "-max-open", "-i-know-that-anyone-can-connect", "examples:", "0x0B", "SIGHUP"} {
		require.Contains(t, out, part)
	}
	_, out, _ = gatewayRun(t, "help")
	require.Empty(t, out)
	var all bytes.Buffer
	require.Equal(t, exitOK, run(t.Context(), nil, &all, io.Discard))
	require.Contains(t, all.String(), "gateway")
}

// PLT-18
func TestGatewayCheckSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	srv, err := faultnet.Start(faultnet.Options{})
	require.NoError(t, err)
	defer srv.Close()
	to := fmt.Sprintf("tcp://127.0.0.1:%d", srv.Port())
	good := []string{"-check", "-framing", "line", "-listen", "127.0.0.1:0", "-to", to}
	status, out, errs := gatewayRun(t, good...)
	require.Equal(t, exitOK, status, errs)
	require.Contains(t, out, "line, from tcp://127.0.0.1:0 to "+to)
	require.Zero(t, srv.Accepts())
	status, out, errs = gatewayRun(t, append(good, "-reach")...)
	require.Equal(t, exitOK, status, errs)
	require.Contains(t, out, "the server was reached")
	require.True(t, eventually(time.Minute, func() bool { return srv.Accepts() == 1 }))
	srv.Stop()
	status, _, errs = gatewayRun(t, append(good, "-reach")...)
	require.Equal(t, exitUsage, status)
	require.Contains(t, errs, "refused")

	for want, args := range map[string][]string{
		"-i-know-that-anyone-can-connect": {"-check", "-framing", "line", "-listen", ":9000", "-to", to},
		"takes both":                      {"-check", "-framing", "line", "-listen", ":9000", "-to", to, "-insecure-listen"},
		"-framing is missing":             {"-check", "-listen", ":0"},
		"no such file":                    {"-check", "-framing", "line", "-listen", "tls://127.0.0.1:0", "-cert", "/nonexistent", "-key", "/nonexistent", "-to", to},
		"unexpected argument":             append(good, "x"),
		"-length-bytes: not for":          append(good, "-length-bytes", "2"),
		"-hold-timeout: not for":          append(good, "-hold-timeout", "2s"),
		"-length-endian":                  {"-check", "-framing", "length", "-length-endian", "middle"},
		"-error-reply":                    append(good, "-error-reply", `\x`),
		"use a size":                      append(good, "-max-frame", "many"),
		"up to 1GiB":                      append(good, "-max-frame", "9GiB"),
		"octal":                           append(good, "-socket-mode", "rwx"),
		"-reach goes with":                {"-reach"},
		"not defined":                     {"-bogus"},
	} {
		status, _, errs := gatewayRun(t, args...)
		require.Equal(t, exitUsage, status, want)
		require.Contains(t, errs, want)
		require.Contains(t, errs, "connpool gateway")
	}
}

func TestGatewayCheckTellsAnExpiredCertificate(t *testing.T) {
	dir := t.TempDir()
	cert, key := writeKeys(t, dir, time.Unix(3600, 0))
	status, out, errs := gatewayRun(t, "-check", "-framing", "line", "-listen", "tls://127.0.0.1:0", "-cert", cert, "-key", key, "-to", "tcp://127.0.0.1:1")
	require.Equal(t, exitUsage, status)
	require.Contains(t, out, "EXPIRED")
	require.Contains(t, errs, "not valid any more")
}

func TestAnAddressInUseIsAnError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	status, _, errs := gatewayRun(t, "-framing", "line", "-listen", l.Addr().String(), "-to", "tcp://127.0.0.1:1")
	require.Equal(t, exitBroken, status)
	require.Contains(t, errs, "-listen")
	require.Contains(t, errs, "in use")
}

// Both units of each size mean the same.
func TestSizesHaveUnits(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "5": 5, "5B": 5, "64KiB": 64 << 10, "16MiB": 16 << 20, "2GiB": 2 << 30} {
		var n int64
		require.NoError(t, byteSize{&n}.Set(text))
		require.Equal(t, want, n)
		var back int64
		require.NoError(t, byteSize{&back}.Set(byteSize{&n}.String()))
		require.Equal(t, want, back)
	}
	for _, bad := range []string{"", "x", "-1", "1.5MiB", "9999999999GiB", "KiB"} {
		var n int64
		require.Error(t, byteSize{&n}.Set(bad), bad)
	}
}

// writeKeys writes a certificate of an authority of its own, valid until the given time.
func writeKeys(t *testing.T, dir string, until time.Time) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: until, DNSNames: []string{"gw.example"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	require.NoError(t, err)
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	require.NoError(t, err)
	cert, key = filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	require.NoError(t, os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	require.NoError(t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600))
	return cert, key
}
