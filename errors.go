package connpool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"
)

// Sentinels, for [errors.Is].
var (
	// ErrClosed says that the pool was closed (or is the zero Pool, which
	// was never opened). Make a new one with [New].
	ErrClosed = errors.New("connpool: pool is closed")

	// ErrReturned says that a [Conn] was used after its loan ended, or
	// after it was detached.
	ErrReturned = errors.New("connpool: connection was given back: a Conn is valid only until fn returns")

	// ErrExhausted says that a limit was reached and the pool was told not
	// to wait: [Fail] is in force, or MaxWaiters borrowers wait already.
	ErrExhausted = errors.New("connpool: limit reached")

	// ErrSessionLost says that the connection a [Pool.Session] kept for an
	// address cannot go on: it died or got dirty between two uses, or the use
	// around this one spoiled or closed it. It is not replaced in silence,
	// because what was begun on it is gone. The next use gets another.
	ErrSessionLost = errors.New("connpool: the session's connection is lost")

	// ErrUnread says that bytes were waiting on an idle connection: why it
	// was closed, or the answer of a [Prober] that wants them to go to
	// Config.Push.
	ErrUnread = errors.New("connpool: bytes were waiting that nobody had asked for")

	// ErrNoneRemovable says that file handles ran out and no idle
	// connection was left that could make room.
	ErrNoneRemovable = errors.New("connpool: out of handles and every connection is in use")
)

// Stage tells how far a borrow came before it failed.
type Stage uint8

const (
	StageUsage     Stage = iota + 1 // the arguments: nothing was tried
	StageWait                       // waiting for a connection or for room for one
	StageBackoff                    // the address failed repeatedly; a new dial is not due yet
	StageDial                       // opening the socket
	StageHandshake                  // the TLS handshake
	StageSetup                      // Config.Setup
	StageSession                    // the session of ctx: its connection is lost, or still in use by another goroutine of it
)

var stageNames = [...]string{StageUsage: "usage", StageWait: "wait", StageBackoff: "back-off",
	StageDial: "dial", StageHandshake: "handshake", StageSetup: "setup", StageSession: "session"}

func (s Stage) String() string { return nameOf(stageNames[:], s) }

// Kind classes an error by what went wrong, whatever layer said so.
type Kind uint8

const (
	KindUnknown           Kind = iota
	KindAccess                 // permission denied
	KindAddress                // no such address or no route to it
	KindBadMessage             // the peer does not speak the protocol expected
	KindBroken                 // reset, aborted, broken pipe
	KindEOF                    // the peer closed the stream
	KindLookup                 // the host name could not be resolved
	KindInternal               // a dialer or hook panicked or broke its contract
	KindCanceled               // the caller's ctx was canceled
	KindRefused                // nobody listens there
	KindResource               // out of handles, ports, memory or room in the pool
	KindTimeout                // too late, and nothing had been transferred
	KindTimeoutInTransfer      // too late, in the middle of an exchange: the connection is out of step
	KindUsage                  // the caller's mistake
)

var kindNames = [...]string{KindUnknown: "unknown", KindAccess: "access", KindAddress: "address",
	KindBadMessage: "bad message", KindBroken: "broken", KindEOF: "eof", KindLookup: "lookup",
	KindInternal: "internal", KindCanceled: "canceled", KindRefused: "refused", KindResource: "resource",
	KindTimeout: "timeout", KindTimeoutInTransfer: "timeout in transfer", KindUsage: "usage"}

func (k Kind) String() string { return nameOf(kindNames[:], k) }

// MarshalText gives the name that String gives.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

func nameOf[T ~uint8](names []string, v T) string {
	if int(v) < len(names) && names[v] != "" {
		return names[v]
	}
	return fmt.Sprintf("%T(%d)", v, v)
}

// Error is what [Pool.With] returns when fn never ran. (An fn that borrows from
// a pool itself may return the *Error of that.)
type Error struct {
	Addr   Addr
	Stage  Stage
	Kind   Kind
	Waited time.Duration // since With was called

	// The books of the address when the borrow failed, and the limit that
	// held it up: Limit connections of what LimitName counts (0 and "" if
	// no limit was in the way).
	Open, InUse, Idle, Waiting int
	Limit                      int
	LimitName                  string

	Err error // never nil
}

// Error says what failed, for how long it was tried, and what to change.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("connpool: ")
	b.WriteString(e.Stage.String())
	if e.Addr != (Addr{}) {
		b.WriteString(" ")
		b.WriteString(e.Addr.String())
	}
	b.WriteString(": ")
	b.WriteString(strings.TrimPrefix(e.Err.Error(), "connpool: "))
	if e.Limit > 0 {
		fmt.Fprintf(&b, " (%d of %d in use, %d waiting; raise %s, borrow for a shorter time, or give ctx longer)",
			e.InUse, e.Limit, e.Waiting, e.LimitName)
	}
	switch {
	case errors.Is(e.Err, errAddrNotAvail):
		b.WriteString(" (no local port is left for this peer: keep connections longer, or raise the range of local ports)")
	case errors.Is(e.Err, ErrNoneRemovable):
		b.WriteString(" (raise the process's limit on open files, or lower MaxOpen so that borrowers queue)")
	}
	if e.Waited > 0 {
		fmt.Fprintf(&b, ", after %v", e.Waited.Round(time.Microsecond))
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// Timeout reports whether the borrow ran out of time.
func (e *Error) Timeout() bool { return e.Kind == KindTimeout }

// PanicError is a panic (or, with a nil Value, a runtime.Goexit) of foreign code
// that ran on a goroutine of the pool's own: a dialer, a hook, a callback of
// tls.Config, a method of a dialer's connection or of the state.
type PanicError struct {
	Where string // "Config.Setup", "Config.Dialers[tcp]", ...
	Value any
	Stack []byte
}

func (e *PanicError) Error() string {
	if e.Value == nil {
		return e.Where + " ended its goroutine (runtime.Goexit)"
	}
	return fmt.Sprintf("%s panicked: %v", e.Where, e.Value)
}

func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// ioError is a time-out inside a loan, with the two facts that the plain error
// of the socket lacks: whose time ran out, and whether bytes had moved.
type ioError struct {
	kind  Kind
	cause error // the ctx's error if it was the ctx, else nil
	err   error
}

func (e *ioError) Error() string {
	if e.cause != nil {
		return e.err.Error() + ": " + e.cause.Error()
	}
	return e.err.Error()
}
func (e *ioError) Unwrap() []error {
	if e.cause != nil {
		return []error{e.cause, e.err}
	}
	return []error{e.err}
}
func (e *ioError) Timeout() bool   { return true }
func (e *ioError) Temporary() bool { return true }

// KindOf classes any error: of With, of a Conn's methods, of package net,
// crypto/tls or the operating system.
func KindOf(err error) Kind {
	var (
		pe  *Error
		ioe *ioError
		pan *PanicError
		brk *brokenContract
		dns *net.DNSError
		rec tls.RecordHeaderError
		ale tls.AlertError
		ver *tls.CertificateVerificationError
		ope *net.OpError
		ne  net.Error
		ade *net.AddrError
		dur interface{ Timeout() bool }
	)
	switch {
	case err == nil:
		return KindUnknown
	case errors.As(err, &pe):
		return pe.Kind
	case errors.As(err, &ioe):
		return ioe.kind
	case errors.As(err, &pan), errors.As(err, &brk):
		return KindInternal
	case errors.Is(err, ErrExhausted), errors.Is(err, ErrNoneRemovable):
		return KindResource
	case errors.Is(err, ErrReturned), errors.Is(err, ErrClosed), errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrInvalid),
		errors.Is(err, errors.ErrUnsupported):
		return KindUsage
	case errors.Is(err, context.Canceled):
		return KindCanceled
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return KindTimeout
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return KindEOF
	case exhausted(err), errors.Is(err, errAddrNotAvail), errors.Is(err, errNoMem), errors.Is(err, errNoBufs):
		return KindResource
	case errors.As(err, &dns):
		if dns.IsTimeout {
			return KindTimeout
		}
		return KindLookup
	case errors.As(err, &rec), errors.As(err, &ale), errors.As(err, &ver),
		errors.As(err, &ope) && (ope.Op == "remote error" || ope.Op == "local error"): // a TLS alert over TCP
		return KindBadMessage
	case errors.Is(err, errRefused), errors.Is(err, fs.ErrNotExist):
		return KindRefused // a Unix socket that is not there has nobody listening either
	case errors.Is(err, errReset), errors.Is(err, errPipe), errors.Is(err, errAborted),
		errors.Is(err, io.ErrClosedPipe), errors.Is(err, io.ErrShortWrite):
		return KindBroken
	case errors.Is(err, fs.ErrPermission):
		return KindAccess
	case errors.Is(err, errNetUnreach), errors.Is(err, errHostUnreach), errors.As(err, &ade),
		errors.Is(err, errAFNoSupport):
		return KindAddress
	case errors.As(err, &ne) && ne.Timeout(), errors.As(err, &dur) && dur.Timeout():
		return KindTimeout
	}
	return KindUnknown
}

// keepError is the verdict of [Keep].
type keepError struct{ err error }

func (k *keepError) Error() string { return k.err.Error() }
func (k *keepError) Unwrap() error { return k.err }

// Keep wraps the error of an exchange that went wrong for its own reasons and
// left the connection in step: a "no such key", a rejected request. fn returns
// Keep(err) to have err reported while the connection goes back to the pool.
// Keep(nil) is nil. It does not save a connection whose socket failed, that
// has unread bytes, or whose ctx is done.
func Keep(err error) error {
	if err == nil {
		return nil
	}
	return &keepError{err}
}

func usage(addr Addr, err error) *Error {
	return &Error{Addr: addr, Stage: StageUsage, Kind: KindUsage, Err: err}
}

func (p *Pool) failed(addr Addr, stage Stage, err error, start instant) *Error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failedLocked(addr, stage, err, start)
}

// failedLocked is the error of a borrow, with the books as they are.
func (p *Pool) failedLocked(addr Addr, stage Stage, err error, start instant) *Error {
	s := p.sites.find(addr)
	if s == nil {
		s = &site{addr: addr, queue: &noQueue} // forgotten: nothing is open for it
	}
	return p.failedAtLocked(s, stage, err, start)
}

func (p *Pool) failedAtLocked(s *site, stage Stage, err error, start instant) *Error {
	e := &Error{Addr: s.addr, Stage: stage, Kind: KindOf(err), Err: err}
	if start != 0 {
		e.Waited = p.clock.exactly().sub(start)
	}
	e.Open, e.InUse, e.Idle, e.Waiting = openOf(&s.n), int(s.n[borrowed]), int(s.n[idle]), s.queue.len
	if stage != StageWait || p.closed {
		return e
	}
	switch e.LimitName = p.fullLocked(s, 0, 0); e.LimitName {
	case "MaxPerAddr":
		e.Limit = p.cfg.MaxPerAddr
	case "MaxOpen":
		e.Limit = p.limitLocked()
		e.Open, e.InUse, e.Idle = openOf(&p.n), int(p.n[borrowed]), int(p.n[idle])
	}
	return e
}
