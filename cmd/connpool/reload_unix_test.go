//go:build !windows && !js && !plan9

package main

import (
	"crypto/tls"
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
