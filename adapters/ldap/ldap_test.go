//go:build unix

package ldap_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/go-ldap/ldap/v3"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	poolldap "github.com/seed-ecb488c9/connpool/adapters/ldap"
	"github.com/seed-ecb488c9/connpool/internal/adaptertest"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

const (
	admin  = "cn=admin,dc=test"
	people = 40
)

func login(_ connpool.Addr, l *ldap.Conn) error { return l.Bind(admin, "secret") }

func newClient(t *testing.T, cfg connpool.Config, addr connpool.Addr) (*poolldap.Client, *connpool.Pool, connpool.Addr) {
	cfg.Setup = poolldap.Setup(login)
	pool, err := connpool.New(cfg)
	require.NoError(t, err)
	return poolldap.New(pool, addr), pool, addr
}

func search(base string) *ldap.SearchRequest {
	return ldap.NewSearchRequest(base, ldap.ScopeBaseObject, ldap.NeverDerefAliases, 0, 0, false, "(objectClass=*)", nil, nil)
}

// directory is a slapd with some units, which speaks TLS if there is an authority.
func directory(t *testing.T, ca *faultnet.CA) *realserver.Server {
	kind, scheme, trust := realserver.Slapd(), "ldap://", new(tls.Config)
	if ca != nil {
		kind, scheme, trust.RootCAs = realserver.SlapdTLS(ca.Server("127.0.0.1")), "ldaps://", ca.Pool()
	}
	srv := realserver.Start(t, kind)
	l, err := ldap.DialURL(scheme+srv.Addr, ldap.DialWithTLSConfig(trust))
	require.NoError(t, err)
	defer l.Close()
	require.NoError(t, login(connpool.Addr{}, l))
	root := ldap.NewAddRequest("dc=test", nil)
	root.Attribute("objectClass", []string{"dcObject", "organization"})
	root.Attribute("o", []string{"test"})
	root.Attribute("dc", []string{"test"})
	require.NoError(t, l.Add(root))
	for i := range people {
		ou := ldap.NewAddRequest(fmt.Sprintf("ou=%d,dc=test", i), nil)
		ou.Attribute("objectClass", []string{"organizationalUnit"})
		ou.Attribute("ou", []string{fmt.Sprint(i)})
		require.NoError(t, l.Add(ou))
	}
	return srv
}

// ADO-14: LDAP in the clear and over TLS, with slapd.
func TestLDAPOverPooledConnections(t *testing.T) {
	t.Run("tcp", func(t *testing.T) { runAll(t, directory(t, nil), connpool.TCP, nil) })
	ca := faultnet.NewCA()
	t.Run("tls", func(t *testing.T) { runAll(t, directory(t, ca), connpool.TLS, &tls.Config{RootCAs: ca.Pool()}) })
}

func runAll(t *testing.T, srv *realserver.Server, transport connpool.Transport, trust *tls.Config) {
	adaptertest.Run(t, srv.Addr, srv.Restart, func(t *testing.T, cfg connpool.Config, host string, port uint16) adaptertest.Client {
		cfg.TLS = trust
		c, pool, addr := newClient(t, cfg, connpool.Addr{Transport: transport, Host: host, Port: port})
		return adaptertest.Client{Pool: pool, Addr: addr, Resident: true,
			Exchange: func(ctx context.Context, n int) error {
				want := fmt.Sprintf("ou=%d,dc=test", n%people)
				found, err := c.Search(ctx, search(want))
				if err == nil && (len(found.Entries) != 1 || found.Entries[0].DN != want) {
					err = fmt.Errorf("asked for %s, got %v", want, found.Entries)
				}
				return err
			},
			Refused: func(ctx context.Context) error {
				_, err := c.Search(ctx, search("ou=nobody,dc=test"))
				return err
			},
			IsRefusal: func(err error) bool { return ldap.IsErrorWithCode(err, ldap.LDAPResultNoSuchObject) },
		}
	})
}

// ADO-14: which answers keep a connection, and which do not.
func TestWhatAnswersMeanForTheConnection(t *testing.T) {
	srv := directory(t, nil)
	t.Run("an answer costs no connection, whatever it is", func(t *testing.T) {
		patience.NothingLeaks(t)
		c, pool := one(t, srv)
		for filter, code := range map[string]uint16{"(": ldap.ErrorFilterCompile, "(ou=1)": ldap.LDAPResultSizeLimitExceeded} {
			r := ldap.NewSearchRequest("dc=test", ldap.ScopeWholeSubtree, ldap.NeverDerefAliases, 1, 0, false, filter, nil, nil)
			if code == ldap.LDAPResultSizeLimitExceeded {
				r.Filter = "(ou=*)" // more than one
			}
			_, err := c.Search(t.Context(), r)
			require.True(t, ldap.IsErrorWithCode(err, code), "%v", err)
		}
		require.Error(t, c.Do(t.Context(), func(l *ldap.Conn) error {
			ou := ldap.NewAddRequest("ou=1,dc=test", nil)
			ou.Attribute("objectClass", []string{"organizationalUnit"})
			return l.Add(ou) // there is one
		}))
		require.EqualValues(t, 1, pool.Stats().Dials)
		require.Empty(t, pool.Stats().Closed)
	})
	t.Run("a connection that somebody else has bound is lent to nobody", func(t *testing.T) {
		patience.NothingLeaks(t)
		c, pool := one(t, srv)
		who := func() (who string) {
			require.NoError(t, c.Do(t.Context(), func(l *ldap.Conn) error {
				r, err := l.WhoAmI(nil)
				if err == nil {
					who = r.AuthzID
				}
				return err
			}))
			return who
		}
		require.Equal(t, "dn:"+admin, who())
		require.NoError(t, c.Authenticate(t.Context(), admin, "secret"))
		require.Equal(t, "dn:"+admin, who())
		err := c.Authenticate(t.Context(), admin, "guess")
		require.True(t, ldap.IsErrorWithCode(err, ldap.LDAPResultInvalidCredentials), "%v", err)
		require.Equal(t, "dn:"+admin, who(), "not of the anonymous one that a failed bind leaves")
		require.EqualValues(t, 3, pool.Stats().Dials)
	})
	t.Run("a login that fails is the error of the borrower", func(t *testing.T) {
		patience.NothingLeaks(t)
		pool, err := connpool.New(connpool.Config{Setup: poolldap.Setup(func(_ connpool.Addr, l *ldap.Conn) error { return l.Bind(admin, "guess") })})
		require.NoError(t, err)
		defer pool.Close()
		_, err = poolldap.New(pool, connpool.MustParseAddr("tcp://"+srv.Addr)).Search(t.Context(), search("dc=test"))
		var e *connpool.Error
		require.ErrorAs(t, err, &e)
		require.Equal(t, connpool.StageSetup, e.Stage)
		require.True(t, ldap.IsErrorWithCode(err, ldap.LDAPResultInvalidCredentials))
	})
}

// one is a client of a pool of one connection.
func one(t *testing.T, srv *realserver.Server) (*poolldap.Client, *connpool.Pool) {
	addr := connpool.MustParseAddr("tcp://" + srv.Addr)
	c, pool, _ := newClient(t, connpool.Config{MaxOpen: 1}, addr)
	t.Cleanup(func() { require.NoError(t, pool.Shutdown(context.Background())) })
	return c, pool
}

// ADO-14: before a clean close the server hears an unbind request.
func TestAConnectionThatIsNotNeededTakesItsLeave(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	heard := make(chan []byte, 1)
	go func() {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		defer nc.Close()
		all, _ := io.ReadAll(nc)
		heard <- all
	}()
	pool, err := connpool.New(connpool.Config{Setup: poolldap.Setup(nil)})
	require.NoError(t, err)
	defer pool.Close()
	c := poolldap.New(pool, connpool.MustParseAddr("tcp://"+l.Addr().String()))
	require.NoError(t, c.Do(t.Context(), func(*ldap.Conn) error { return nil }))
	require.NoError(t, pool.Shutdown(t.Context()))
	require.Equal(t, []byte{0x30, 5, 2, 1, 1, 0x42, 0}, patience.InTime(t, heard), "message 1, an unbind request")
}
