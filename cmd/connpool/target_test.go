package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
)

// ORA-77: the same over TLS; the peer is trusted only if its certificate verifies or the
// user insists.
func TestPeerBehindTLSIsVerifiedUnlessTheUserInsists(t *testing.T) {
	t.Parallel()
	s, err := faultnet.Start(faultnet.Options{Network: "tls"})
	require.NoError(t, err)
	defer s.Close()
	hostport := net.JoinHostPort(s.Host(), strconv.Itoa(int(s.Port())))
	nc, err := tls.Dial("tcp", hostport, &tls.Config{InsecureSkipVerify: true})
	require.NoError(t, err)
	leaf := nc.ConnectionState().PeerCertificates[0]
	nc.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw}), 0o600))

	for _, command := range [][]string{
		{"load", "-n", "20", "-rounds", "2", "-workers", "2"},
		{"size", "-step", "20ms", "-max-clients", "2"},
	} {
		for _, c := range []struct {
			flags []string
			want  int
		}{
			{[]string{"-tls-ca", ca}, exitOK},
			{[]string{"-tls-insecure-trust-anyone"}, exitOK},
			{nil, exitBroken},
		} {
			var out, errs bytes.Buffer
			args := append(append(append([]string{}, command...), "-quiet", "-to", "tls://"+hostport), c.flags...)
			assert.Equal(t, c.want, run(t.Context(), args, &out, &errs), "%v: %s", args, errs.String())
			if c.want != exitOK {
				assert.Contains(t, errs.String(), "certificate")
			}
		}
	}
	assert.Zero(t, s.Overlaps(), "nobody asks twice at once")
}

func TestPeerBehindAUnixSocketIsMeasured(t *testing.T) {
	t.Parallel()
	s, err := faultnet.Start(faultnet.Options{Network: "unix"})
	require.NoError(t, err)
	defer s.Close()
	var out, errs bytes.Buffer
	require.Equal(t, exitOK, run(t.Context(), []string{"load", "-n", "20", "-rounds", "2", "-to", "unix:" + s.Host()}, &out, &errs), errs.String())
	assert.True(t, eventually(time.Minute, func() bool { return s.Open() == 0 }))
}

// Ctrl-C in the middle of a run that would take an hour: there is a report, and nothing
// stays open.
func TestInterruptEndsEveryCommandAndLeavesNothing(t *testing.T) {
	require.NoError(t, openNetpoller())
	to := "tcp://" + startEcho(t)
	for name, c := range map[string]struct {
		args   []string
		status int
	}{
		"load":       {[]string{"load", "-to", to, "-for", "1h", "-rounds", "1000"}, -1}, // depends on how far it came
		"size":       {[]string{"size", "-to", to, "-step", "1h"}, exitBroken},
		"size early": {[]string{"size", "-to", to, "-step", "100ms", "-max-clients", "100000"}, exitOK},
		"simulation": {[]string{"size", "-users", "10000", "-think", "10s", "-simulate", "-requests", "1000000000"}, exitBroken},
	} {
		t.Run(name, func(t *testing.T) {
			before := footprintNow()
			var out, errs bytes.Buffer
			status := exitBroken
			// A busy machine has measured nothing yet when a short time is over.
			for d := short.Of(500*time.Millisecond, 250*time.Millisecond); d < time.Minute; d *= 4 {
				out.Reset()
				errs.Reset()
				ctx, cancel := context.WithTimeout(t.Context(), d)
				began := time.Now()
				status = run(ctx, c.args, &out, &errs)
				cancel()
				assert.Less(t, time.Since(began), 2*time.Minute)
				if c.status < 0 || status == c.status {
					break
				}
			}
			if c.status >= 0 {
				assert.Equal(t, c.status, status, errs.String())
			}
			if status == exitOK {
				assert.Contains(t, out.String(), "interrupted")
			} else {
				assert.Contains(t, errs.String(), "interrupted")
			}
			assert.True(t, eventually(time.Minute, func() bool {
				left := footprintNow().beyond(before)
				return left.goroutines == 0 && left.descriptors <= 0
			}), "%+v", footprintNow().beyond(before))
		})
	}
}
