package connpool

import (
	"context"
	"runtime"
)

// A session keeps the connections of one piece of work, such as a request. The
// pool does not know it: for the books a connection of a session is borrowed,
// from the session's first use of the address to its end.

// session is what a ctx and the end function of Pool.Session refer to. When
// nobody can reach it any more, its seats are given up.
type session struct {
	*sessionConns
	stop func() bool // ends the watch on Session's ctx, which keeps the session reachable
}

// sessionKey is the key of a session in a ctx: one for each pool.
type sessionKey struct{ p *Pool }

// Session returns a ctx under which every [Pool.With] for an address gets the
// same connection: one after another, nested in each other, in contexts derived
// from it. It is the pool's answer to a request whose parts all talk to one
// peer, and to a transaction over several calls. end gives the connections
// back, and must be called; a second call does nothing. The end of ctx does the
// same. A With that is running then gives its connection back when it
// returns. Afterwards uses of the ctx borrow as if there had been no session.
//
// Between two uses the connection is in use, as far as limits and Stats are
// concerned; Config.Reset runs at the end of the session. Each use is judged as
// With says: one that fails costs the connection, and the next use gets another.
// If the connection died, or the peer sent something, between two uses, the
// next use fails with ErrSessionLost, once, because what was begun on the
// connection is gone.
//
// Two goroutines never use the connection at the same time: the second waits
// for the first, under its own ctx. A With inside the fn of another is part of
// that: it gets the same Conn, its ctx governs the I/O while it lasts, its
// error (without Keep) or panic costs the connection when the outer one ends,
// and until then further Withs inside get ErrSessionLost. What counts as
// "inside" is the goroutine. So fn must not start a goroutine that uses the
// same session and address, and wait for it: that one waits for fn, until its
// ctx is done. Let it use the ctx from before the session.
//
// A session inside a session of the same pool joins it, and its end does
// nothing. Each pool has sessions of its own. Leases are no part of them.
func (p *Pool) Session(ctx context.Context) (_ context.Context, end func()) {
	if outer, _ := ctx.Value(sessionKey{p}).(*session); outer != nil && outer.lives() {
		return ctx, func() {}
	}
	s := &session{sessionConns: &sessionConns{
		p: p, ctx: context.WithoutCancel(ctx), trace: p.cfg.trace(ctx), byAddr: make(map[Addr]*sessionConn),
	}}
	p.inSession.Add(1)
	runtime.AddCleanup(s, func(b *sessionConns) { go b.leakedSession() }, s.sessionConns)
	s.stop = context.AfterFunc(ctx, s.endQuietly)
	return context.WithValue(ctx, sessionKey{p}, s), s.end
}

func (s *session) lives() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.ended
}

// end gives back what nobody uses at the moment.
func (s *session) end() {
	defer runtime.KeepAlive(s)
	s.stop()
	s.releaseAll(s.endSession())
}

// endQuietly is end on a goroutine of its own.
func (s *session) endQuietly() {
	s.releaseQuietly(s.endSession()...)
	runtime.KeepAlive(s)
}

// forgotten is the end of a session that nobody can reach.
func (b *sessionConns) leakedSession() {
	for _, c := range b.endSession() {
		if c.abort() {
			c.noteLeaked()
		}
	}
}

// withinSession is With if ctx has a session of p's; else it says false.
func (p *Pool) withinSession(ctx context.Context, addr Addr, fn func(Conn) error) (joined bool, _ error) {
	s, _ := ctx.Value(sessionKey{p}).(*session)
	if s == nil {
		return false, nil
	}
	defer runtime.KeepAlive(s)
	if ctx.Err() != nil {
		return true, p.tooLate(ctx, addr)
	}
	addr, err := p.cfg.canonical(addr)
	if err != nil {
		return true, usage(addr, err)
	}
	me := newUse()
	st, nested, err := s.acquire(ctx, addr, *me)
	switch {
	case err != nil || st == nil:
	case nested:
		err = st.nested(ctx, fn)
	default:
		err = s.useMarked(ctx, st, fn, *me)
	}
	freeUse(me)
	return err != nil || st != nil, err
}
