//go:build unix

package clients

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

// pgClient is pgconn's connection, made for Carry:
//
//	k, err := dialPostgres(ctx, addr)
//	if err != nil {
//		return nil, err
//	}
//	return connpool.Carry(k, k.alive, k.Conn()), nil
type pgClient struct{ *pgconn.PgConn }

func dialPostgres(ctx context.Context, addr connpool.Addr) (*pgClient, error) {
	cfg, err := pgconn.ParseConfig("postgres://postgres@" + net.JoinHostPort(addr.Host, strconv.Itoa(int(addr.Port))) + "/postgres?sslmode=disable")
	if err != nil {
		return nil, err
	}
	pc, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &pgClient{pc}, nil
}

// alive makes no system call. It says what the last borrower left behind. The end of the
// connection is heard through the socket that Carry got.
func (k *pgClient) alive() error {
	switch {
	case k.IsClosed():
		return net.ErrClosed
	case k.IsBusy():
		return errors.New("a result was not read to its end")
	case k.TxStatus() != 'I':
		return errors.New("a transaction was left open")
	}
	return nil
}

// Close ends the session with Terminate. A PgConn is not safe for concurrent use. So if the pool
// has closed the socket, because an exchange was broken off, Close leaves the PgConn to the
// borrower who may still be in it; the PgConn then fails, and cleans up for itself.
func (k *pgClient) Close() error {
	if err := k.Conn().SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err // the socket is closed
	}
	return k.PgConn.Close(context.Background())
}

func (k *pgClient) socket() net.Conn { return k.Conn() }

var postgres = library{
	kind: realserver.Postgres("-c", "log_disconnections=on", "-c", "log_min_messages=debug1"),
	dial: func(ctx context.Context, addr connpool.Addr) (carriedClient, error) {
		return orNil(dialPostgres(ctx, addr))
	},
	exchange: func(k carriedClient, n int) error {
		const query = "select $1::int8, repeat('x', ($1::int8 % 7)::int * 1000)"
		got := k.(*pgClient).ExecParams(context.Background(), query, [][]byte{fmt.Append(nil, n)}, nil, nil, nil).Read()
		if got.Err != nil {
			return got.Err
		}
		if len(got.Rows) != 1 || string(got.Rows[0][0]) != strconv.Itoa(n) || len(got.Rows[0][1]) != n%7*1000 {
			return fmt.Errorf("asked for %d, got %.40q", n, got.Rows)
		}
		return nil
	},
	refused: func(k carriedClient) error {
		var no *pgconn.PgError
		_, err := k.(*pgClient).Exec(context.Background(), "select nothing").ReadAll()
		if !errors.As(err, &no) {
			return fmt.Errorf("the server says no, not %w", err)
		}
		return connpool.Keep(err)
	},
	endless: func(k carriedClient, begun func()) error {
		results := k.(*pgClient).Exec(context.Background(), "select pg_sleep(3600)")
		begun()
		_, err := results.ReadAll()
		return err
	},
	abandon: []func(k carriedClient) error{
		func(k carriedClient) error {
			k.(*pgClient).Exec(context.Background(), "select 1")
			return nil // without the result
		},
		func(k carriedClient) error {
			_, err := k.(*pgClient).Exec(context.Background(), "begin").ReadAll()
			return err
		},
		func(k carriedClient) error {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
			defer cancel()
			k.(*pgClient).Exec(ctx, "select pg_sleep(3600)").ReadAll()
			return nil // the error is ignored
		},
	},
	goodbyes: func(t *testing.T, srv *realserver.Server) int {
		log := logOf(t, srv, "log")
		return strings.Count(log, "disconnection: session time") - strings.Count(log, "unexpected EOF on client connection")
	},
}

// ADO-02: pgconn dials for itself. The pool lends its PgConn.
func TestPgconnIsCarried(t *testing.T) { postgres.test(t) }

// ADO-02: and so does a pgconn whose queries know the ctx of the loan, so that PostgreSQL is told
// to stop.
func TestAQueryThatKnowsTheCtxOfItsLoanIsCancelled(t *testing.T) {
	srv := postgres.start(t)
	p, addr, clients := postgres.pool(t, srv, nil)
	ctx, cancel := context.WithCancel(t.Context())
	err := p.With(ctx, addr, func(c connpool.Conn) error {
		pg := connpool.State[*counted](c).carriedClient.(*pgClient)
		time.AfterFunc(20*time.Millisecond, cancel)
		_, err := pg.Exec(c.Context(), "select pg_sleep(3600)").ReadAll()
		return err
	})
	require.Error(t, err)
	eventually(t, "the client is closed, and the slot is free", func() bool { return p.Stats().Open == 0 && clients.closed() == 1 })
	closedFor(t, p, connpool.ClosedCanceled, 1)
	require.NoError(t, p.With(t.Context(), addr, func(c connpool.Conn) error {
		pg := connpool.State[*counted](c).carriedClient.(*pgClient)
		require.Eventually(t, func() bool {
			got, err := pg.Exec(t.Context(), "select count(*) from pg_stat_activity where query like '%sleep(36%' and state = 'active' and pid <> pg_backend_pid()").ReadAll()
			return err == nil && string(got[0].Rows[0][0]) == "0"
		}, time.Minute, 10*time.Millisecond, "the query has ended at the server")
		return nil
	}))
}
