package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A KeyUpdate that asks for one in return makes crypto/tls write when it is
// only asked to look. If the peer reads nothing and the socket takes no more,
// that write must not hold up the borrower, whose ctx says how long it waits,
// nor the sweep.
//
// G-03, G-04
func TestPeerThatAsksForKeyUpdatesAndDoesNotReadHoldsUpNobody(t *testing.T) {
	for name, sweep := range map[string]bool{"loan": false, "sweep": true, "loan, foreign TLS": false, "sweep, foreign TLS": true} {
		t.Run(name, func(t *testing.T) {
			foreign := func(*Config) {}
			if strings.Contains(name, "foreign") {
				foreign = tlOwnTLS
			}
			tlBaseline(t)
			cfg := tlVersion(tls.VersionTLS13)
			cfg.SessionTicketsDisabled = true
			s := tlServe(t, cfg)
			p := tlPool(t, false, func(cfg *Config) { cfg.SweepInterval = time.Hour }, foreign)
			_, err := tlWith(t, p, s.addr(), func(c Conn) error {
				if err := errors.Join(tlChat(c), tlSay(c, "deaf")); err != nil {
					return err
				}
				raw, err := c.SyscallConn()
				if err != nil {
					return err
				}
				// What the kernel takes is not the same from one moment to
				// the next: full is what stays full for a while.
				for rest := 0; rest < 20; rest++ {
					raw.Write(func(fd uintptr) bool {
						for b := make([]byte, 1<<16); len(b) > 0; {
							n, err := syscall.Write(int(fd), b)
							switch {
							case err == nil && n > 0:
								rest = 0
							case len(b) > 1:
								b = b[:len(b)/2]
							default:
								return true
							}
						}
						return true
					})
					time.Sleep(time.Millisecond)
				}
				return nil
			})
			require.NoError(t, err)
			peer := s.last()
			f := tlForge(t, peer)
			for range 3 {
				require.NoError(t, f.send(f.keyUpdate(true)))
			}
			tlSettle(t, p, s.addr())

			done := make(chan error, 1)
			go func() {
				if sweep {
					sweepAll(p)
					done <- nil
					return
				}
				ctx, cancel := context.WithTimeout(context.Background(), bounded/2)
				defer cancel()
				done <- p.With(ctx, s.addr(), tlNothing)
			}()
			select {
			case err := <-done:
				require.NoError(t, err, "there was time enough to open another one")
				peer.reset() // or the goodbye of a foreign tls.Conn takes its five seconds
			case <-time.After(bounded):
				t.Error("the look hangs in a write")
				peer.reset()
				<-done
			}
		})
	}
}

// A look needs no descriptor: with not a single one left in the process,
// healthy connections are lent and dead ones are recognized.
func TestLooksWorkWithoutAFreeDescriptor(t *testing.T) {
	for _, how := range tlTransports {
		t.Run(how.name, func(t *testing.T) {
			tlBaseline(t)
			s := how.serve(t)
			p := tlPool(t, true, how.config)
			_, err := tlWith(t, p, s.addr(), tlNothing)
			require.NoError(t, err)
			tlReady(t, s.last())

			var limit syscall.Rlimit
			require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
			none := limit
			none.Cur = 0
			require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none))
			restore := func() { require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)) }
			t.Cleanup(restore)
			_, err = os.Open(os.DevNull)
			require.ErrorIs(t, err, syscall.EMFILE, "the test means nothing otherwise")

			for _, loan := range []func(Conn) error{tlNothing, tlChat, tlChat} {
				id, err := tlWith(t, p, s.addr(), loan)
				require.NoError(t, err)
				require.EqualValues(t, 1, id)
			}
			s.last().Conn.(*net.TCPConn).CloseWrite()
			tlSettle(t, p, s.addr())
			_, err = tlWith(t, p, s.addr(), tlChat)
			require.ErrorIs(t, err, syscall.EMFILE)
			require.Equal(t, KindResource, KindOf(err))
			closedSoon(t, p, map[CloseReason]uint64{ClosedStale: 1})

			restore()
			_, err = tlWith(t, p, s.addr(), tlChat)
			require.NoError(t, err)
		})
	}
}
