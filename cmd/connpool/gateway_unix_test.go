//go:build !windows && !js && !plan9

package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// endsInTime sends a process SIGTERM, and waits for its end.
func endsInTime(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	left := make(chan error, 1)
	go func() { left <- cmd.Wait() }()
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	select {
	case <-left:
	case <-time.After(time.Minute):
		cmd.Process.Kill()
		<-left
		t.Fatal("SIGTERM does not end it")
	}
}

// TRY-09
func TestTheReaderOfItsWordsMayLeaveOrStandStill(t *testing.T) {
	t.Parallel()
	srv, err := faultnet.Start(faultnet.Options{})
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	for _, how := range []string{"stderr's reader leaves", "stdout's reader leaves", "nobody reads"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			dir := shortDirOf(t)
			cmd := exec.Command(os.Args[0], "gateway", "-framing", "line", "-listen", "unix:"+dir+"/s", "-drain", "1s", "-verbose", "-dial-timeout", "1s",
				"-to", fmt.Sprintf("tcp://127.0.0.1:%d", srv.Port()))
			cmd.Env = append(os.Environ(), "CONNPOOL_TEST_AS=command")
			errs, toErrs, err := os.Pipe()
			require.NoError(t, err)
			outs, toOuts, err := os.Pipe()
			require.NoError(t, err)
			cmd.Stderr, cmd.Stdout = toErrs, toOuts
			if how == "nobody reads" { // and the pipe is full
				fill(t, toErrs)
				fill(t, toOuts)
			}
			require.NoError(t, cmd.Start())
			toErrs.Close()
			toOuts.Close()
			defer errs.Close()
			defer outs.Close()
			defer cmd.Process.Kill()
			var nc net.Conn
			require.True(t, eventually(time.Minute, func() bool {
				nc, err = net.Dial("unix", dir+"/s")
				return err == nil
			}), "it listens")
			switch how {
			case "stderr's reader leaves":
				errs.Close()
			case "stdout's reader leaves":
				outs.Close()
			}
			// Each of these leaves a line behind.
			for range 100 {
				bad, err := net.Dial("unix", dir+"/s")
				require.NoError(t, err, "it lives")
				fmt.Fprintf(bad, "x\n")
				bad.Close()
			}
			nc.SetDeadline(time.Now().Add(time.Minute))
			fmt.Fprintf(nc, "token\n")
			line, err := bufio.NewReader(nc).ReadString('\n')
			require.NoError(t, err)
			require.Contains(t, line, "token")
			nc.Close()
			endsInTime(t, cmd)
			if how != "nobody reads" {
				assert.Equal(t, exitOK, cmd.ProcessState.ExitCode())
			}
			_, err = os.Lstat(dir + "/s")
			require.ErrorIs(t, err, os.ErrNotExist)
		})
	}
}

// fill fills a pipe.
func fill(t *testing.T, f *os.File) {
	t.Helper()
	require.NoError(t, f.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
	for {
		if _, err := f.Write(make([]byte, 1)); err != nil {
			break
		}
		io.WriteString(f, strings.Repeat("x", 4096))
	}
	require.NoError(t, f.SetWriteDeadline(time.Time{}))
}

func shortDirOf(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "gw")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TRY-09: a hanging system call ends with the process.
func TestSIGTERMEndsAStartThatHangs(t *testing.T) {
	dir := shortDirOf(t)
	never := filepath.Join(dir, "never.pem")
	require.NoError(t, syscall.Mkfifo(never, 0o600))
	locked, err := os.Open(dir)
	require.NoError(t, err)
	defer locked.Close()
	require.NoError(t, syscall.Flock(int(locked.Fd()), syscall.LOCK_EX))
	for name, args := range map[string][]string{
		"a file that does not open": {"-listen", "tls://127.0.0.1:0", "-cert", never, "-key", never},
		"a lock":                    {"-listen", "unix:" + dir + "/s"},
		"a lock for the status":     {"-listen", "127.0.0.1:0", "-status", "unix:" + dir + "/s"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], append([]string{"gateway", "-framing", "line", "-to", "tcp://127.0.0.1:1"}, args...)...)
			cmd.Env = append(os.Environ(), "CONNPOOL_TEST_AS=command")
			require.NoError(t, cmd.Start())
			defer cmd.Process.Kill()
			// The test waits until the process has its signal handler: signals to a
			// process that has just started end it in any case.
			require.True(t, eventually(time.Minute, func() bool { return handlesSIGTERM(cmd.Process.Pid) }))
			endsInTime(t, cmd)
		})
	}
}

// TRY-09: with a certificate file that no longer opens, also while the gateway serves.
func TestSIGTERMEndsAGatewayWhoseCertificateDoesNotOpen(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cert, key := writeKeys(t, dir, time.Now().Add(time.Hour))
	g := startGateway(t, "-framing", "line", "-listen", "tls://127.0.0.1:0", "-cert", cert, "-key", key, "-reload-every", "10ms", "-drain", "1s", "-to", "tcp://127.0.0.1:1")
	// In one step: a reload that found no file in between would have been told, and the next
	// failure not before a minute has passed.
	require.NoError(t, syscall.Mkfifo(cert+".fifo", 0o600))
	require.NoError(t, os.Rename(cert+".fifo", cert))
	require.NoError(t, g.Process.Signal(syscall.SIGHUP))
	require.True(t, eventually(time.Minute, func() bool { return strings.Contains(g.said(), "does not open") }), g.said())
	require.NoError(t, g.Process.Signal(syscall.SIGTERM))
	require.Equal(t, exitOK, g.ended(), g.said())
}

// pongs answers PING as a Redis does: with its argument, if it has one.
func pongs(nc net.Conn) {
	r := bufio.NewReader(nc)
	number := func() (n int, err error) {
		line, err := r.ReadString('\n')
		if err == nil {
			n, err = strconv.Atoi(strings.TrimRight(line[1:], "\r\n"))
		}
		return n, err
	}
	for {
		words, err := number()
		answer := "+PONG\r\n"
		for i := range words {
			n, err := number()
			if err != nil {
				return
			}
			word := make([]byte, n+2)
			if _, err := io.ReadFull(r, word); err != nil {
				return
			}
			if i == 1 {
				answer = fmt.Sprintf("$%d\r\n%s", n, word)
			}
		}
		if err != nil {
			return
		}
		io.WriteString(nc, answer)
	}
}

// TRY-17
func TestFewDescriptorsAreSharedOutBeforeClientsTakeThem(t *testing.T) {
	t.Setenv("CONNPOOL_TEST_FILES", "64")
	to := "tcp://" + startServer(t, pongs)
	g := startGateway(t, "-framing", "resp", "-listen", "tcp://127.0.0.1:0", "-to", to, "-request-timeout", "5s")
	told, in := 0, []net.Conn(nil)
	for range 100 {
		nc, err := net.Dial("tcp", g.at)
		require.NoError(t, err)
		defer nc.Close()
		in = append(in, nc)
	}
	answered := 0
	for _, nc := range in {
		nc.SetDeadline(time.Now().Add(time.Minute))
		io.WriteString(nc, ping)
		line, err := bufio.NewReader(nc).ReadString('\n')
		require.NoError(t, err)
		switch line {
		case "+PONG\r\n":
			answered++
		case "-ERR max number of clients reached\r\n":
			told++
		default:
			t.Fatalf("came %q", line)
		}
	}
	assert.Greater(t, answered, 10)
	assert.Equal(t, 100, answered+told)
	require.NoError(t, g.Process.Signal(syscall.SIGTERM))
	require.Equal(t, exitOK, g.ended(), g.said())

	for given, want := range map[string]string{"": "for clients", "500": "there is room for"} {
		args := []string{"gateway", "-check", "-framing", "resp", "-listen", "127.0.0.1:0", "-to", to}
		if given != "" {
			args = append(args, "-max-clients", given)
		}
		cmd := exec.Command(os.Args[0], args...)
		cmd.Env = append(os.Environ(), "CONNPOOL_TEST_AS=command")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		require.Contains(t, string(out), want)
		require.Contains(t, string(out), "file descriptors: of 64")
	}
}

// limitFiles lowers the limit of descriptors in a child that is to have few.
func limitFiles(n string) {
	var r syscall.Rlimit
	if _, err := fmt.Sscan(n, &r.Cur); err == nil {
		r.Max = r.Cur
		syscall.Setrlimit(syscall.RLIMIT_NOFILE, &r)
	}
}

// handlesSIGTERM reports whether a process handles the signal itself; true where the
// system does not tell.
func handlesSIGTERM(pid int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(status)) {
		var mask uint64
		if _, err := fmt.Sscanf(line, "SigCgt: %x", &mask); err == nil {
			return mask&(1<<(uint(syscall.SIGTERM)-1)) != 0
		}
	}
	return false
}
