package main

import (
	"crypto/x509"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

func TestExampleRuns(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(&out, nil))
	require.Equal(t, "db.example: [192.0.2.53], <nil>\nnowhere.example: [], no such name: nowhere.example.\ndb.example: [192.0.2.53], <nil>\nhandshakes: 1\n", out.String())
	require.Error(t, run(&out, []string{"nowhere"}))
}

func TestManyQuestionsShareFewHandshakes(t *testing.T) {
	s, roots, err := loopback.StartTLS(serveZone)
	require.NoError(t, err)
	defer s.Close()
	r, err := newResolver(s.Addr(), roots)
	require.NoError(t, err)
	defer r.pool.Close()
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for range 20 {
				if addrs, err := r.lookup(t.Context(), "DB.example"); err != nil || len(addrs) != 1 {
					t.Errorf("%v, %v", addrs, err)
				}
				if _, err := r.lookup(t.Context(), "none.example"); err == nil {
					t.Error("there is no such name")
				}
				if _, err := r.lookup(t.Context(), strings.Repeat("x", 300)); err == nil {
					t.Error("no name is that long")
				}
			}
		})
	}
	all.Wait()
	require.LessOrEqual(t, r.pool.Stats().PeakOpen, 4)
	require.Less(t, s.Accepted(), 20, "of 640 questions")
}

func TestResolverOfAnotherNameIsNotBelieved(t *testing.T) {
	s, roots, err := loopback.StartTLS(serveZone)
	require.NoError(t, err)
	defer s.Close()
	addr := s.Addr()
	addr.ServerName = "dns.example"
	for _, c := range []struct {
		addr  connpool.Addr
		roots *x509.CertPool
	}{{addr, roots}, {s.Addr(), x509.NewCertPool()}} {
		r, err := newResolver(c.addr, c.roots)
		require.NoError(t, err)
		_, err = r.lookup(t.Context(), "db.example")
		require.Error(t, err)
		require.Equal(t, connpool.KindBadMessage, connpool.KindOf(err))
		r.pool.Close()
	}
}

// The server hangs up after each answer, as resolvers do after a while: no question fails
// because of that.
func TestServerThatHangsUpCostsAHandshakeAndNoAnswer(t *testing.T) {
	gone := make(chan struct{}, 100)
	s, roots, err := loopback.StartTLS(func(nc net.Conn) {
		m, err := receive(nc)
		if err != nil {
			return
		}
		m.Response = true
		send(nc, m)
		nc.Close() // with close_notify
		gone <- struct{}{}
	})
	require.NoError(t, err)
	defer s.Close()
	r, err := newResolver(s.Addr(), roots)
	require.NoError(t, err)
	defer r.pool.Close()
	for range 5 {
		_, err := r.lookup(t.Context(), "db.example")
		require.NoError(t, err)
		<-gone
	}
	require.Equal(t, 5, s.Accepted())
}
