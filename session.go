package connpool

import (
	"context"
	"runtime"
)

// A session keeps the connections of one piece of work, such as a request. In the books
// a connection of a session is a borrowed one, from the session's first use of the
// address to the end of the session.

// session is what the ctx and the end function of Pool.Session refer to. When it
// becomes unreachable, the connections of the session are closed as leaked.
type session struct {
	*sessionConns
	stop func() bool // stops the watch on Session's ctx, which keeps the session reachable
}

// Session returns a ctx under which every [Pool.With] for an address gets the same
// connection: Withs that run one after another, Withs nested in each other, and Withs
// under contexts derived from it. Use it for a request whose parts all talk to one
// peer, and for a transaction that spans several calls. end gives the connections back,
// and must be called; a second call does nothing. The end of ctx has the same effect. A
// With that is running at that moment gives its connection back when it returns.
// Afterwards a With under the ctx borrows as if there had been no session.
//
// Between two uses the connection counts as in use for limits and Stats. Config.Reset
// runs at the end of the session. Each use is judged as With says: if a use fails, the
// pool closes the connection, and the next use gets another. If the connection died, or
// the peer sent something, between two uses, the next use fails once with
// ErrSessionLost, because what was begun on the connection is lost.
//
// Two goroutines never use the connection at the same time: the second waits for the
// first, under its own ctx. A With inside the fn of another With is part of the outer
// one: it gets the same Conn, and its ctx governs the I/O while it lasts. If it returns
// an error (without Keep) or panics, the pool closes the connection when the outer With
// ends, and until then further nested Withs fail with ErrSessionLost. A With is nested
// if it runs on the same goroutine. So fn must not start a goroutine that uses the same
// session and address and then wait for it: that goroutine waits for fn until its ctx
// is done. Give such a goroutine the ctx from before the session.
//
// A session inside a session of the same pool joins the outer session, and its end does
// nothing. Each pool has sessions of its own. Leases take no part in sessions.
func (p *Pool) Session(ctx context.Context) (_ context.Context, end func()) {
	if outer, _ := ctx.Value(sessionKey{p}).(*session); outer != nil && outer.lives() {
		return ctx, func() {}
	}
	s := &session{sessionConns: &sessionConns{
		p: p, ctx: context.WithoutCancel(ctx), trace: p.trace(ctx), byAddr: make(map[Addr]*sessionConn),
	}}
	p.inSession.Add(1)
	runtime.AddCleanup(s, func(b *sessionConns) { go b.leakedSession() }, s.sessionConns)
	s.stop = context.AfterFunc(ctx, s.endQuietly)
	return context.WithValue(ctx, sessionKey{p}, s), s.end
}

// lives reports whether the session has not ended.
func (s *session) lives() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.ended
}

// end ends the session and gives back the connections that no use has at the moment.
func (s *session) end() {
	defer runtime.KeepAlive(s)
	s.stop()
	s.releaseAll(s.endSession())
}

// endQuietly is end for the watch on Session's ctx: a panic of Reset is logged.
func (s *session) endQuietly() {
	s.releaseQuietly(s.endSession()...)
	runtime.KeepAlive(s)
}

// leakedSession ends a session that became unreachable, and closes its connections as
// leaked.
func (b *sessionConns) leakedSession() {
	for _, c := range b.endSession() {
		if c.abort() {
			c.noteLeaked()
		}
	}
}

// withinSession is With for a ctx that has a session of p. It reports false if there is
// none, or if the session has ended; then With borrows as usual.
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
		err = s.useNumbered(ctx, st, fn, *me)
	}
	freeUse(me)
	return err != nil || st != nil, err
}
