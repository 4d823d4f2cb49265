package connpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/sock"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The other half of the torture: the same over real sockets, with the k-th
// system call of the pool's own giving the worst answer it can give.

// tortureSystem is realSystem, the target-th call of which goes wrong.
type tortureSystem struct {
	target, calls atomic.Int64
	hit           atomic.Value
}

func (x *tortureSystem) fails(what string) bool {
	if x.calls.Add(1) != x.target.Load() {
		return false
	}
	x.hit.Store(what)
	return true
}

func (x *tortureSystem) system() *system {
	worse := os.NewSyscallError("torture", syscall.EIO)
	return &system{
		dial: func(ctx context.Context, a Addr) (net.Conn, error) {
			if x.fails("dial") {
				return nil, worse
			}
			if x.fails("dial, without a handle") {
				return nil, os.NewSyscallError("socket", sock.ErrProcessFiles)
			}
			return dialSocket(ctx, a)
		},
		identify: func(fd uintptr) (sock.ID, bool) {
			if x.fails("identify") {
				return sock.ID(0), false
			}
			return sock.Identify(fd)
		},
		stillIs: func(fd uintptr, id sock.ID) bool { return !x.fails("stillIs") && sock.Still(fd, id) },
		peek: func(fd uintptr) sock.Seen {
			if x.fails("peek: error") {
				return sock.Seen{Err: worse}
			}
			if x.fails("peek: bytes") {
				return sock.Seen{Bytes: true}
			}
			return sock.Peek(fd)
		},
		readNow: func(fd uintptr, b []byte) (int, error) {
			if x.fails("readNow") {
				return 0, worse
			}
			return sock.ReadNow(fd, b)
		},
		handleLimit: func() (int, bool) {
			if x.fails("handleLimit: none") {
				return 0, false
			}
			if x.fails("handleLimit: tiny") {
				return 1, true
			}
			return sock.FileLimit()
		},
		noHandleFree: func() bool { return x.fails("noHandleFree") || sock.NoFileFree() },
	}
}

func TestNothingIsLostWhicheverSystemCallFails(t *testing.T) {
	plain, err := faultnet.Start(faultnet.Options{})
	require.NoError(t, err)
	defer plain.Close()
	secret, err := faultnet.Start(faultnet.Options{Network: "tls"})
	require.NoError(t, err)
	defer secret.Close()
	hits := make(map[string]int)
	for k := int64(1); ; k += short.Of[int64](1, 4) {
		x := new(tortureSystem)
		x.target.Store(k)
		if err := x.run(plain, secret); err != nil {
			t.Fatalf("call %d (%v): %v", k, x.hit.Load(), err)
		}
		if x.hit.Load() == nil {
			t.Logf("%d calls tortured: %v", k-1, hits)
			require.Greater(t, k, int64(60))
			break
		}
		hits[x.hit.Load().(string)]++
	}
	// What was taken for stolen is kept for good, as it must be; here it was
	// the pool's own, and the test may close it.
	quarantine.mu.Lock()
	defer quarantine.mu.Unlock()
	for _, nc := range quarantine.conns {
		nc.Close()
	}
	require.Eventually(t, func() bool { return plain.Open()+secret.Open() == 0 }, time.Minute, time.Millisecond)
}

func (x *tortureSystem) run(plain, secret *faultnet.Server) error {
	p, err := New(Config{MaxPerAddr: 2, TLS: secret.ClientTLS(), DialTimeout: time.Second,
		Reset: func(context.Context, Conn) error { return nil }})
	if err != nil {
		return err
	}
	p.sys = x.system()
	addrs := []Addr{
		{Transport: TCP, Host: plain.Host(), Port: plain.Port()},
		{Transport: TLS, Host: secret.Host(), Port: secret.Port()},
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	token := func(c Conn) error {
		text := fmt.Sprintf("%d-%d", c.Info().ID, c.Info().Uses)
		if _, err := fmt.Fprintf(c, "%s\n", text); err != nil {
			return err
		}
		var serial, seq int
		var got string
		if _, err := fmt.Fscanf(c, "%d %d %s\n", &serial, &seq, &got); err != nil {
			return err
		}
		if got != text {
			return fmt.Errorf("sent %s, got %s", text, got)
		}
		return nil
	}
	with := func(a Addr, fn func(Conn) error) error {
		err := p.With(ctx, a, fn)
		if err != nil && x.hit.Load() == nil && !errors.Is(err, errFn) {
			return fmt.Errorf("nothing was tortured yet: %w", err)
		}
		return nil
	}
	for range 3 {
		for _, a := range addrs {
			if err := with(a, token); err != nil {
				return err
			}
		}
	}
	var group tasks.Group
	for range 6 { // two at a time
		group.Go(func() { p.With(ctx, addrs[0], token) })
	}
	group.Wait()
	if err := with(addrs[1], func(Conn) error { return errFn }); err != nil {
		return err
	}
	with(addrs[1], token)
	sweepAll(p)
	p.EvictLRU()
	with(addrs[0], token)
	p.Retire(addrs[0])
	if err := p.inconsistency(); err != nil {
		return err
	}
	x.target.Store(-1)
	p.handles.refresh(p.sys)
	for _, a := range addrs { // both slots, of both
		hold := make(chan struct{})
		held := make(chan error, 2)
		in := make(chan struct{}, 2)
		for range 2 {
			go func() {
				held <- p.With(ctx, a, func(c Conn) error {
					in <- struct{}{}
					<-hold
					return token(c)
				})
			}()
		}
		for range 2 {
			select {
			case <-in:
			case err := <-held:
				return fmt.Errorf("the pool is not usable: %w", err)
			}
		}
		close(hold)
		for range 2 {
			if err := <-held; err != nil {
				return fmt.Errorf("the pool is not usable: %w", err)
			}
		}
	}
	if err := p.Close(); err != nil {
		return err
	}
	if st := p.Stats(); st.Open != 0 || st.Waiting != 0 {
		return fmt.Errorf("left over: %v", st)
	}
	return p.inconsistency()
}
