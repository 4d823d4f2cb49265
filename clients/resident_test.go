//go:build unix

package clients

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"
	"github.com/go-ldap/ldap/v3"
	"github.com/gomodule/redigo/redis"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

func addrOf(t *testing.T, srv *realserver.Server, transport connpool.Transport) connpool.Addr {
	t.Helper()
	host, port, err := net.SplitHostPort(srv.Addr)
	require.NoError(t, err)
	n, err := strconv.ParseUint(port, 10, 16)
	require.NoError(t, err)
	return connpool.Addr{Transport: transport, Host: host, Port: uint16(n)}
}

// hold occupies n connections at once, and gives all of them back.
func hold(t *testing.T, p *connpool.Pool, addr connpool.Addr, n int) {
	t.Helper()
	for range n {
		l, err := p.Lease(t.Context(), addr)
		require.NoError(t, err)
		defer l.Return()
	}
}

// thousand is 1,000 exchanges by 16 borrowers.
func thousand(t *testing.T, p *connpool.Pool, addr connpool.Addr, exchange func(c connpool.Conn, n int) error) {
	t.Helper()
	var all sync.WaitGroup
	for w := range 16 {
		all.Go(func() {
			for i := w; i < 1000; i += 16 {
				if err := p.With(t.Context(), addr, func(c connpool.Conn) error { return exchange(c, i) }); err != nil {
					t.Error(i, err)
				}
			}
		})
	}
	all.Wait()
}

// restarts restarts the server: whoever borrows an idle connection then gets a live one.
func restarts(t *testing.T, srv *realserver.Server, p *connpool.Pool, addr connpool.Addr, exchange func(c connpool.Conn, n int) error) {
	t.Helper()
	hold(t, p, addr, 4)
	require.Equal(t, 4, p.Stats().Idle)
	srv.Restart(t)
	require.Eventually(t, func() bool { return p.Stats().Open == 0 }, time.Minute, time.Millisecond, "the ends are heard")
	thousand(t, p, addr, exchange)
	st := p.Stats()
	require.LessOrEqual(t, st.Open, 4)
	require.Equal(t, st.Open, st.Residents)
}

// ADO-01: go-ldap against slapd, as its documentation writes it.
func TestGoLDAPIsAResidentClient(t *testing.T) {
	srv := realserver.Start(t, realserver.Slapd())
	p, err := connpool.New(connpool.Config{MaxOpen: 4, Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
		l := ldap.NewConn(nc, false)
		l.Start()
		return connpool.Resident(l, nil), l.Bind("cn=admin,dc=test", "secret")
	}})
	require.NoError(t, err)
	defer p.Close()
	addr := addrOf(t, srv, connpool.TCP)
	require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error {
		l := connpool.State[*ldap.Conn](c)
		root := ldap.NewAddRequest("dc=test", nil)
		root.Attribute("objectClass", []string{"dcObject", "organization"})
		root.Attribute("o", []string{"test"})
		root.Attribute("dc", []string{"test"})
		if err := l.Add(root); err != nil {
			return err
		}
		for i := range 20 {
			ou := ldap.NewAddRequest(fmt.Sprintf("ou=%d,dc=test", i), nil)
			ou.Attribute("objectClass", []string{"organizationalUnit"})
			ou.Attribute("ou", []string{fmt.Sprint(i)})
			if err := l.Add(ou); err != nil {
				return err
			}
		}
		return nil
	}))
	search := func(c connpool.Conn, n int) error {
		l := connpool.State[*ldap.Conn](c)
		if n%9 == 0 { // an answer that nobody waits for
			soon, cancel := context.WithCancel(context.Background())
			r := l.SearchAsync(soon, ldap.NewSearchRequest("dc=test", ldap.ScopeWholeSubtree, ldap.NeverDerefAliases, 0, 0, false, "(ou=*)", nil, nil), 1)
			cancel()
			for r.Next() {
			}
		}
		want := fmt.Sprintf("ou=%d,dc=test", n%20)
		found, err := l.Search(ldap.NewSearchRequest(want, ldap.ScopeBaseObject, ldap.NeverDerefAliases, 0, 0, false, "(objectClass=*)", nil, nil))
		if err != nil {
			return err
		}
		if len(found.Entries) != 1 || found.Entries[0].DN != want {
			return fmt.Errorf("asked for %s, got %v", want, found.Entries)
		}
		return nil
	}
	thousand(t, p, addr, search)
	require.LessOrEqual(t, p.Stats().Dials, uint64(4))
	require.Empty(t, p.Stats().Closed)
	restarts(t, srv, p, addr, search)

	// A ctx that ends in a loan closes the client, and the borrower's call returns.
	ctx, cancel := context.WithCancel(t.Context())
	err = p.With(ctx, addr, func(c connpool.Conn) error {
		cancel()
		for {
			if _, err := connpool.State[*ldap.Conn](c).WhoAmI(nil); err != nil {
				return err
			}
		}
	})
	require.Error(t, err)
	require.NoError(t, p.Shutdown(t.Context()))
}

// ADO-01: go-imap against dovecot. The client gets messages unasked, between loans, too.
func TestGoIMAPIsAResidentClient(t *testing.T) {
	srv := realserver.Start(t, realserver.Dovecot())
	p, err := connpool.New(connpool.Config{MaxOpen: 4, Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
		c := imapclient.New(nc, nil)
		if err := c.WaitGreeting(); err != nil {
			return nil, err
		}
		alive := func() error {
			select {
			case <-c.Closed():
				return net.ErrClosed
			default:
				return nil
			}
		}
		return connpool.Resident(c, alive), c.Login("user", "secret").Wait()
	}})
	require.NoError(t, err)
	defer p.Close()
	addr := addrOf(t, srv, connpool.TCP)
	require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error {
		m := connpool.State[*imapclient.Client](c)
		for i := range 10 {
			text := fmt.Appendf(nil, "Subject: mail %d\r\n\r\ntext\r\n", i)
			up := m.Append("INBOX", int64(len(text)), nil)
			if _, err := up.Write(text); err != nil {
				return err
			}
			if err := up.Close(); err != nil {
				return err
			}
			if _, err := up.Wait(); err != nil {
				return err
			}
		}
		return nil
	}))
	fetch := func(c connpool.Conn, n int) error {
		m := connpool.State[*imapclient.Client](c)
		if _, err := m.Select("INBOX", nil).Wait(); err != nil {
			return err
		}
		got, err := m.Fetch(imap.SeqSetNum(uint32(n%10+1)), &imap.FetchOptions{Envelope: true}).Collect()
		if err != nil {
			return err
		}
		if len(got) != 1 || got[0].Envelope.Subject != fmt.Sprintf("mail %d", n%10) {
			return fmt.Errorf("asked for mail %d, got %v", n%10, got)
		}
		return nil
	}
	thousand(t, p, addr, fetch)
	require.LessOrEqual(t, p.Stats().Dials, uint64(4))
	require.Empty(t, p.Stats().Closed)
	restarts(t, srv, p, addr, fetch)
	require.NoError(t, p.Shutdown(t.Context()))
}

// ADO-02: redigo dials for itself. The pool lends its Conn.
func TestRedigoIsCarried(t *testing.T) {
	srv := realserver.Start(t, realserver.Redis())
	p, err := connpool.New(connpool.Config{MaxOpen: 4, Dialers: map[connpool.Transport]connpool.DialFunc{
		"redis": func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
			c, err := redis.DialContext(ctx, "tcp", addr.HostPort())
			if err != nil {
				return nil, err
			}
			return connpool.Carry(c, func() error { _, err := c.Do("PING"); return err }, nil), nil
		},
	}})
	require.NoError(t, err)
	defer p.Close()
	addr := addrOf(t, srv, "redis")
	echo := func(c connpool.Conn, n int) error {
		want := fmt.Appendf(nil, "%d", n)
		got, err := redis.Bytes(connpool.State[redis.Conn](c).Do("ECHO", want))
		if err == nil && !bytes.Equal(got, want) {
			err = errors.New("a reply reached the wrong borrower")
		}
		return err
	}
	thousand(t, p, addr, echo)
	require.LessOrEqual(t, p.Stats().Dials, uint64(4))
	require.Empty(t, p.Stats().Closed)
	hold(t, p, addr, 4)
	srv.Restart(t)
	thousand(t, p, addr, echo) // alive finds the dead ones
	require.NoError(t, p.Shutdown(t.Context()))
	require.Zero(t, p.Stats().Open)
}
