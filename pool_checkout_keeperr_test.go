package connpool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// ldapError is a result that a directory sent: the exchange was complete.
type ldapError struct{ code int }

func (e *ldapError) Error() string { return fmt.Sprintf("LDAP result %d", e.code) }

const (
	ldapNoSuchObject = 32
	ldapUnavailable  = 52
)

var errCacheMiss = errors.New("memcache: cache miss")

// harmless is the KeepErr of these two protocols.
func harmless(_ Addr, err error) bool {
	var result *ldapError
	if errors.As(err, &result) {
		return result.code != ldapUnavailable
	}
	return errors.Is(err, errCacheMiss)
}

// ADO-05: which errors leave a connection in step is said once, for every kind of use.
func TestKeepErrKeepsWhatTheProtocolCallsHarmless(t *testing.T) {
	wrapped := fmt.Errorf("get colour: %w", errCacheMiss)
	for _, c := range []struct {
		err  error
		kept bool
	}{
		{errCacheMiss, true},
		{wrapped, true},
		{&ldapError{ldapNoSuchObject}, true},
		{&ldapError{ldapUnavailable}, false},
		{errBoom, false},
		{Keep(errBoom), true}, // Keep wins
		{&Error{Err: errCacheMiss}, false},
		{fmt.Errorf("the other server: %w", &Error{Err: errCacheMiss}), false},
		{nil, true},
	} {
		for way, use := range map[string]func(n *testnet, fn func(Conn) error) error{
			"With": func(n *testnet, fn func(Conn) error) error { return n.p.With(bg, at("a"), fn) },
			"Do": func(n *testnet, fn func(Conn) error) error {
				l, err := n.p.Lease(bg, at("a"))
				require.NoError(n.t, err)
				defer l.Return()
				return l.Do(bg, fn)
			},
			"session": func(n *testnet, fn func(Conn) error) error {
				ctx, end := n.p.Session(bg)
				defer end()
				return n.p.With(ctx, at("a"), fn)
			},
			"nested": func(n *testnet, fn func(Conn) error) (err error) {
				ctx, end := n.p.Session(bg)
				defer end()
				require.NoError(n.t, n.p.With(ctx, at("a"), func(Conn) error {
					err = n.p.With(ctx, at("a"), fn)
					return nil
				}))
				return err
			},
		} {
			t.Run(fmt.Sprintf("%v %s", c.err, way), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					n := open(t, Config{KeepErr: harmless})
					got := use(n, func(Conn) error { return c.err })
					if isKept(c.err) {
						require.ErrorIs(t, got, errBoom)
					} else {
						require.True(t, got == c.err, "the borrower gets its own error, %v", got)
					}
					if c.kept {
						n.gauges(0, 1, 0)
					} else {
						n.closed(reasons{ClosedFnError: 1})
					}
				})
			})
		}
	}
}

// ADO-05: KeepErr is asked about errors only, only without Keep, and only if nothing else
// speaks against the connection.
func TestKeepErrIsAskedOnlyWhereItDecides(t *testing.T) {
	bubble(t, func(t *testing.T) {
		asked := 0
		n := open(t, Config{KeepErr: func(a Addr, err error) bool {
			require.Equal(t, at("a"), a)
			asked++
			return true
		}})
		n.Host("a").Serve(echoLines)
		n.use(at("a"))
		require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error { _, err := askLine(c, "x"); return err }))
		require.ErrorIs(t, n.p.With(bg, at("a"), func(Conn) error { return Keep(errBoom) }), errBoom)
		require.Zero(t, asked)
		n.gauges(0, 1, 0)

		for name, c := range map[string]struct {
			hurt   func(Conn)
			reason CloseReason
		}{
			"timed out": {func(c Conn) {
				c.SetReadDeadline(time.Now().Add(time.Second))
				c.Read(make([]byte, 1))
			}, ClosedFnError},
			"broken":      {func(c Conn) { n.peer(c).Reset(); c.Read(make([]byte, 1)) }, ClosedFnError},
			"half closed": {func(c Conn) { c.CloseWrite() }, ClosedFnError},
			"in flight":   {func(c Conn) { go c.Read(make([]byte, 1)); synctest.Wait() }, ClosedFnError},
			"closed":      {func(c Conn) { c.Close() }, ClosedByBorrower},
		} {
			before := n.p.Stats().Closed[c.reason]
			require.ErrorIs(t, n.p.With(bg, at("a"), func(l Conn) error { c.hurt(l); return errBoom }), errBoom)
			synctest.Wait()
			require.Equal(t, before+1, n.p.Stats().Closed[c.reason], name)
			require.Zero(t, asked, name)
		}
		ctx, cancel := context.WithCancel(bg)
		require.ErrorIs(t, n.p.With(ctx, at("a"), func(Conn) error { cancel(); return errBoom }), errBoom)
		require.Zero(t, asked, "canceled")

		require.ErrorIs(t, n.p.With(bg, at("a"), func(Conn) error { return errBoom }), errBoom)
		require.Equal(t, 1, asked)
		n.gauges(0, 1, 0)
	})
}

// ADO-05: bytes that are left decide, whatever KeepErr says.
func TestKeepErrForgivesNoBytes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{KeepErr: harmless})
		n.Host("a").Serve(echoLines)
		require.ErrorIs(t, n.p.With(bg, at("a"), func(c Conn) error {
			c.Write([]byte("x\n"))
			synctest.Wait()
			return errCacheMiss
		}), errCacheMiss)
		n.use(at("a"))
		require.Zero(t, n.p.Stats().Reused)
	})
}

// ADO-05: a KeepErr that does not answer discards, and the borrower still gets its error.
func TestAKeepErrThatDoesNotAnswerDiscards(t *testing.T) {
	for name, c := range map[string]struct {
		ask       func(never <-chan struct{}) bool
		abandoned uint64
		log       string
	}{
		"panic":  {func(<-chan struct{}) bool { panic("wrong") }, 0, "Config.KeepErr panicked: wrong"},
		"Goexit": {func(<-chan struct{}) bool { runtime.Goexit(); return true }, 0, "Config.KeepErr"},
		"hang":   {func(never <-chan struct{}) bool { <-never; return true }, 1, "Config.KeepErr did not end in time"},
	} {
		for _, nested := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, nested %v", name, nested), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					var log bytes.Buffer
					never := make(chan struct{})
					defer close(never)
					n := open(t, Config{
						KeepErr: func(Addr, error) bool { return c.ask(never) },
						Logger:  slog.New(slog.NewTextHandler(&log, nil)),
					})
					ctx, end := n.p.Session(bg)
					defer end()
					began := time.Now()
					fails := func(ctx context.Context) error {
						return n.p.With(ctx, at("a"), func(Conn) error { return errBoom })
					}
					var err error
					if nested {
						require.NoError(t, n.p.With(ctx, at("a"), func(Conn) error { err = fails(ctx); return nil }))
					} else {
						err = fails(bg)
					}
					require.True(t, err == errBoom)
					require.LessOrEqual(t, time.Since(began), foreignPatience)
					n.closed(reasons{ClosedFnError: 1})
					require.Equal(t, c.abandoned, n.p.Stats().AbandonedCalls)
					require.Contains(t, log.String(), c.log)
				})
			})
		}
	}
}
