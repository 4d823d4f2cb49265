//go:build !windows && !js && !plan9

package main

import (
	"crypto/tls"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestSIGHUPReadsTheCertificatesAgain(t *testing.T) {
	dir := t.TempDir()
	cert, key := writeKeys(t, dir, time.Now().Add(time.Hour))
	g := startGateway(t, "-framing", "line", "-listen", "tls://127.0.0.1:0", "-cert", cert, "-key", key, "-reload-every", "-1s", "-to", "tcp://127.0.0.1:1")
	end := func() time.Time {
		nc, err := tls.Dial("tcp", g.at, &tls.Config{InsecureSkipVerify: true})
		require.NoError(t, err)
		defer nc.Close()
		return nc.ConnectionState().PeerCertificates[0].NotAfter
	}
	before := end()
	writeKeys(t, dir, time.Now().Add(100*time.Hour))
	require.Equal(t, before, end())
	require.NoError(t, g.Process.Signal(syscall.SIGHUP))
	require.True(t, eventually(time.Minute, func() bool { return strings.Contains(g.said(), "certificates reloaded") }))
	require.Greater(t, end().Sub(before), 50*time.Hour)
	g.Process.Signal(syscall.SIGTERM)
	require.Equal(t, exitOK, g.ended())
}

// TRY-28: SIGHUP does not end a gateway that has only just been started.
func TestSIGHUPEndsNoGatewayThatStarts(t *testing.T) {
	cert := filepath.Join(t.TempDir(), "cert.pem")
	require.NoError(t, syscall.Mkfifo(cert, 0o600))
	cmd := exec.Command(os.Args[0], "gateway", "-framing", "line", "-listen", "tls://127.0.0.1:0", "-cert", cert, "-key", cert+".none", "-to", "tcp://127.0.0.1:1")
	cmd.Env = append(os.Environ(), "CONNPOOL_TEST_AS=command")
	require.NoError(t, cmd.Start())
	defer cmd.Process.Kill()
	file, err := os.OpenFile(cert, os.O_WRONLY, 0) // returns when the gateway opens the file
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Signal(syscall.SIGHUP))
	require.NoError(t, file.Close())
	cmd.Wait()
	require.Equal(t, exitUsage, cmd.ProcessState.ExitCode(), "it ends by itself, because there is no key")
}
