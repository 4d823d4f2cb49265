//go:build unix

package clients

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

// sshClient is a client of an SSH server that accepts every channel and is
// silent from then on. A channel refuses deadlines.
func sshClient(t *testing.T) *ssh.Client {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	signer, err := ssh.NewSignerFromKey(key)
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		cfg := &ssh.ServerConfig{NoClientAuth: true}
		cfg.AddHostKey(signer)
		_, channels, requests, err := ssh.NewServerConn(nc, cfg)
		if err != nil {
			return
		}
		go ssh.DiscardRequests(requests)
		for c := range channels {
			_, requests, _ := c.Accept()
			go ssh.DiscardRequests(requests)
		}
	}()
	c, err := ssh.Dial("tcp", l.Addr().String(), &ssh.ClientConfig{HostKeyCallback: ssh.InsecureIgnoreHostKey()})
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// TRY-06
func TestAnSSHChannelIsInterruptedByCtx(t *testing.T) {
	client := sshClient(t)
	p, err := connpool.New(connpool.Config{MaxPerAddr: 1, Dialers: map[connpool.Transport]connpool.DialFunc{
		"ssh": func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
			return client.DialContext(ctx, "tcp", a.Host)
		},
	}})
	require.NoError(t, err)
	defer p.Close()
	addr := connpool.Addr{Transport: "ssh", Host: "127.0.0.1:1"}
	for range 3 { // the slot is free each time
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		err := p.With(ctx, addr, func(c connpool.Conn) error {
			_, err := c.Read(make([]byte, 1))
			return err
		})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		cancel()
	}
	require.Eventually(t, func() bool { return p.Stats().Open == 0 }, forever, time.Millisecond, "each channel is closed")
	require.EqualValues(t, 3, p.Stats().Dials)
}

// pgx keeps its connections and makes one more to cancel a query. With a pool
// that is full of its own connections the cancel request must get through.
//
// TRY-18
func TestPgxCancelsAQueryThoughThePoolIsFullOfItsConnections(t *testing.T) {
	s := realserver.Start(t, realserver.Postgres())
	p, err := connpool.New(connpool.Config{MaxOpen: 2})
	require.NoError(t, err)
	defer p.Close()
	cfg, err := pgx.ParseConfig("postgres://postgres@" + s.Addr + "/postgres?sslmode=disable")
	require.NoError(t, err)
	cfg.DialFunc = p.DialOverflow(2)
	cfg.BuildContextWatcherHandler = func(pc *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.CancelRequestContextWatcherHandler{Conn: pc, CancelRequestDelay: 0, DeadlineDelay: forever}
	}
	ctx, cancel := context.WithTimeout(context.Background(), forever)
	defer cancel()
	require.Eventually(t, func() bool { // it listens before it lets anybody in
		c, err := pgx.ConnectConfig(ctx, cfg)
		if err == nil {
			c.Close(ctx)
		}
		return err == nil
	}, forever, 10*time.Millisecond)
	var conns []*pgx.Conn
	for range 2 {
		c, err := pgx.ConnectConfig(ctx, cfg)
		require.NoError(t, err)
		defer c.Close(ctx)
		conns = append(conns, c)
	}
	for _, c := range conns {
		short, stop := context.WithTimeout(ctx, 100*time.Millisecond)
		_, err := c.Exec(short, "select pg_sleep(25)")
		stop()
		require.Error(t, err)
		require.True(t, strings.Contains(err.Error(), "57014") || short.Err() != nil, "%v", err)
		var one int
		require.NoError(t, c.QueryRow(ctx, "select 1").Scan(&one), "the connection goes on, since its query was cancelled")
	}
}
