package connpool

import (
	"context"
	"errors"
)

// With borrows a connection to addr, runs fn with it, and gives it back.
//
// fn has the connection alone until fn returns. A [Conn] that is kept longer
// answers ErrReturned. ctx governs the wait for the connection and the I/O inside
// fn: the pool sets the deadline of ctx on the socket, and the end of ctx
// interrupts a blocked call, in the first 10 ms of a loan up to 10 ms late (more on a
// machine whose processors are all busy). ctx does not govern the dial, because another borrower
// may get the connection (the dial does get the values of ctx). With itself returns
// when ctx is done, even during a dial.
//
// With returns the error of fn unchanged, but without the marks of Keep (if one is
// inside the error, in a wrapper that errors.Is and errors.As see through). nil or
// Keep(err) gives the connection back to the pool. The pool closes the connection
// and does not lend it again if fn returned any other error, panicked (With passes
// the panic on), called runtime.Goexit, or called Conn.Close; if ctx is done; if an
// operation on the connection is still running, failed, or timed out (only Keep
// forgives a time-out; Config.KeepErr may forgive an error); if it was closed for writing; if bytes are left unread in
// the connection, in crypto/tls or in the state's buffer, or unflushed in that buffer;
// or if Config.Reset fails. Conn.Detach takes the connection out of the pool for
// good. A panic of Reset, Check or a Prober that runs on the borrower's time reaches
// the borrower, as a *PanicError.
//
// An *[Error] means that fn never ran, and says at which stage the borrow failed
// and why: errors.Is finds ErrClosed, ErrExhausted, ErrNoneRemovable, the error of
// ctx or the error of the dial in it. fn is never run twice. A connection that died
// while it was idle never reaches the caller: the pool takes the next one or opens
// one. If the peer gives up new connections before fn has them, the pool opens three
// at most for one borrow.
//
// Under the ctx of a [Pool.Session], fn gets the connection of the session. The
// session keeps the connection between two uses, and the rules above about giving
// back apply at the session's end.
//
// A loan under a ctx that can be done costs what a loan under context.Background does:
// only a loan that lasts for more than 10 ms sets a deadline and a context.AfterFunc. A
// deadline that is nearer is set at once. A nil ctx or fn is an error.
func (p *Pool) With(ctx context.Context, addr Addr, fn func(Conn) error) error {
	switch {
	case p.stop == nil:
		return usage(addr, ErrClosed)
	case ctx == nil:
		return usage(addr, errors.New("ctx is nil: pass context.Background()"))
	case fn == nil:
		return usage(addr, errors.New("fn is nil"))
	}
	if p.inSession.Load() != 0 {
		if joined, err := p.withinSession(ctx, addr, fn); joined {
			return err
		}
	}
	k := checkout{p: p, trace: p.trace(ctx)}
	k.get(&addr)
	if err := k.borrow(ctx, &addr); err != nil {
		return err
	}
	defer k.rescue()
	if p.loanLog.wanted {
		k.record(1)
	}
	loan := k.start(ctx)
	k.got()
	err := fn(loan)
	if err == nil {
		k.c.noteContent()
	}
	return k.finish(ctx, err)
}
