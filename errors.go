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

	"github.com/seed-ecb488c9/connpool/internal/clock"
	"github.com/seed-ecb488c9/connpool/internal/sock"
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
	// to wait: [FullFail] is in force, or MaxWaiters borrowers wait already.
	ErrExhausted = errors.New("connpool: limit reached")

	// ErrSessionLost says that the connection a [Pool.Session] kept for an
	// address cannot go on: it died or got dirty between two uses, or the use
	// around this one spoiled or closed it. It is not replaced in silence,
	// because what was begun on it is gone. The next use gets another.
	ErrSessionLost = errors.New("connpool: the session's connection is lost")

	// ErrUnread says that bytes were waiting which nobody had asked for: why an
	// idle connection was closed, why Config.Setup failed or a loan's connection
	// was not kept, or the answer of a [Prober] that wants the bytes to go to
	// Config.Push.
	ErrUnread = errors.New("connpool: bytes were waiting that nobody had asked for")

	// ErrNoneRemovable says that file handles ran out and no idle
	// connection was left that could make room.
	ErrNoneRemovable = errors.New("connpool: out of handles, and no idle connection is left to close")
)

// noHandle is a dial that lacked a handle, with nothing left to make room.
type noHandle struct{ err error }

func (e *noHandle) Error() string   { return ErrNoneRemovable.Error() + ": " + e.err.Error() }
func (e *noHandle) Unwrap() []error { return []error{ErrNoneRemovable, e.err} }

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
	// None of the others; also the class of nil.
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

	elsewhere bool // the pool had nothing open when handles ran out
}

// Error says in one line what failed, for how long it was tried, and what to
// change.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("connpool: ")
	b.WriteString(e.Stage.String())
	if e.Addr != (Addr{}) {
		b.WriteString(" ")
		b.WriteString(e.Addr.String())
	}
	b.WriteString(": ")
	b.WriteString(strings.TrimPrefix(textOf(e.Err), "connpool: "))
	if e.Limit > 0 {
		e.adviseOnLimit(&b)
	}
	switch {
	case e.Err == nil:
	case errors.Is(e.Err, sock.ErrAddrNotAvail):
		b.WriteString(" (no local port is left for this peer: keep connections longer, or raise the range of local ports)")
	case errors.Is(e.Err, ErrNoneRemovable) && e.elsewhere:
		b.WriteString(" (raise the process's limit on open files: none of them is the pool's)")
	case errors.Is(e.Err, ErrNoneRemovable):
		b.WriteString(" (raise the process's limit on open files, or lower MaxOpen so that borrowers queue)")
	}
	if e.Waited > 0 {
		fmt.Fprintf(&b, ", after %v", e.Waited.Round(time.Microsecond))
	}
	return oneLine(b.String())
}

// adviseOnLimit says how full the limit is that was in the way, and what helps
// against it.
func (e *Error) adviseOnLimit(b *strings.Builder) {
	switch e.LimitName {
	case "MaxWaiters":
		fmt.Fprintf(b, " (%d of %d waiting; raise MaxWaiters", e.Waiting, e.Limit)
	case "MaxDialing", "MaxDialingPerAddr":
		fmt.Fprintf(b, " (%d dials of %d under way, %d waiting; raise %s", e.Limit, e.Limit, e.Waiting, e.LimitName)
	case "MaxIdle", "MaxIdlePerAddr":
		fmt.Fprintf(b, " (no more than %d may be idle; raise %s, or warm fewer)", e.Limit, e.LimitName)
		return
	default:
		fmt.Fprintf(b, " (%d of %d in use, %d waiting; raise %s", e.InUse, e.Limit, e.Waiting, e.LimitName)
	}
	switch {
	case errors.Is(e.Err, ErrExhausted):
		b.WriteString(", borrow for a shorter time, or let borrowers wait: WhenFull, MaxWaiters)")
	case e.Kind == KindTimeout:
		b.WriteString(", borrow for a shorter time, or give ctx longer)")
	default:
		b.WriteString(", or borrow for a shorter time)")
	}
}

func (e *Error) Unwrap() error { return e.Err }

// Timeout reports whether the borrow ran out of time.
func (e *Error) Timeout() bool { return e.Kind == KindTimeout }

// Temporary makes e a net.Error. It reports whether time, or something of the
// process's own, ran out.
func (e *Error) Temporary() bool { return e.Kind == KindTimeout || e.Kind == KindResource }

var _ net.Error = (*Error)(nil)

// As gives errors.As a *net.OpError, as package net's dialer would: that of the dial
// if there was one, else one with the Op "dial" that wraps e.
func (e *Error) As(target any) bool {
	if op, ok := target.(**net.OpError); ok {
		if !errors.As(e.Err, op) {
			*op = e.opError("", "")
		}
		return true
	}
	return entomb(target)
}

// PanicError is a panic (or, with a nil Value, a runtime.Goexit) of foreign code
// that ran on a goroutine of the pool's own: a dialer, a hook, a callback of
// tls.Config, a method of a dialer's connection or of the state.
type PanicError struct {
	Where string // "Config.Setup", "Config.Dialers[tcp]", ...
	Value any
	Stack []byte

	cause error // Value, if it is an error, as far as its methods can be called
}

func (e *PanicError) Error() string {
	if e.Value == nil {
		return e.Where + " ended its goroutine (runtime.Goexit)"
	}
	return oneLine(fmt.Sprintf("%s panicked: %s", e.Where, panicText(e.Value)))
}

func (e *PanicError) Unwrap() error {
	if e.cause != nil {
		return e.cause
	}
	err, _ := e.Value.(error) // of one that was made elsewhere
	return spent(err)
}

// textOf is what err says, in one line.
func textOf(err error) string {
	if err == nil {
		return "no error"
	}
	return oneLine(err.Error())
}

// oneLine is text with its lines after each other, since a log takes an error for
// one line: errors.Join and what peers say have several.
func oneLine(text string) string {
	if !strings.ContainsAny(text, "\n\r") {
		return text
	}
	lines := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' })
	for i, l := range lines {
		lines[i] = strings.TrimSpace(l)
	}
	return strings.Join(lines, "; ")
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
		return oneLine(e.err.Error() + ": " + e.cause.Error())
	}
	return oneLine(e.err.Error())
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
	if k, ok := ownKind(err); ok {
		return k
	}
	var (
		pe  *Error
		ioe *ioError
		pan *PanicError
		brk *brokenContract
		ful *backlogFull
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
	case errors.Is(err, ErrExhausted), errors.Is(err, ErrNoneRemovable), errors.As(err, &ful):
		return KindResource
	case errors.Is(err, sock.ErrTimedOut):
		if inTransfer(err) {
			return KindBroken
		}
		return KindTimeout
	case errors.Is(err, ErrReturned), errors.Is(err, ErrClosed), errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrInvalid),
		errors.Is(err, errors.ErrUnsupported):
		return KindUsage
	case errors.Is(err, context.Canceled):
		return KindCanceled
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return KindTimeout
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return KindEOF
	case sock.OutOfFiles(err), errors.Is(err, sock.ErrAddrNotAvail), errors.Is(err, sock.ErrNoMem), errors.Is(err, sock.ErrNoBufs):
		return KindResource
	case errors.As(err, &dns):
		if dns.IsTimeout {
			return KindTimeout
		}
		return KindLookup
	case errors.As(err, &rec), errors.As(err, &ale), errors.As(err, &ver),
		errors.As(err, &ope) && (ope.Op == "remote error" || ope.Op == "local error"): // a TLS alert over TCP
		return KindBadMessage
	case errors.Is(err, sock.ErrRefused), errors.Is(err, fs.ErrNotExist):
		return KindRefused // a Unix socket that is not there has nobody listening either
	case errors.Is(err, sock.ErrReset), errors.Is(err, sock.ErrPipe), errors.Is(err, sock.ErrAborted),
		errors.Is(err, io.ErrClosedPipe), errors.Is(err, io.ErrShortWrite):
		return KindBroken
	case errors.Is(err, fs.ErrPermission):
		return KindAccess
	case errors.Is(err, sock.ErrNetUnreach), errors.Is(err, sock.ErrHostUnreach), errors.As(err, &ade),
		errors.Is(err, sock.ErrAFNoSupport):
		return KindAddress
	case errors.As(err, &ne) && ne.Timeout(), errors.As(err, &dur) && dur.Timeout():
		return KindTimeout
	}
	for ; err != nil; err = errors.Unwrap(err) {
		if strings.HasPrefix(err.Error(), "tls: ") { // most of crypto/tls's errors have no type
			return KindBadMessage
		}
	}
	return KindUnknown
}

// inTransfer reports whether err comes from an operation on a connection, and not
// from the dial: that the system gave up there is the end of a connection.
func inTransfer(err error) bool {
	var (
		ope *net.OpError
		sys *os.SyscallError
	)
	if errors.As(err, &ope) {
		return !strings.Contains(ope.Op, "dial") && !strings.Contains(ope.Op, "connect")
	}
	if errors.As(err, &sys) {
		return !strings.HasPrefix(strings.ToLower(sys.Syscall), "connect")
	}
	return false
}

// ownKind is that of the outermost error of a pool's in err. What is further in, as
// the cause of a ctx or the last dial's error, may be of another kind, and of
// another pool.
func ownKind(err error) (Kind, bool) {
	for err != nil {
		switch e := err.(type) {
		case *Error:
			return e.Kind, true
		case *ioError:
			return e.kind, true
		case *inVain:
			return KindOf(e.ctx), true
		case *ctxError:
			return KindOf(e.err), true
		case interface{ Unwrap() error }:
			err = e.Unwrap()
		case interface{ Unwrap() []error }:
			for _, one := range e.Unwrap() {
				if k, ok := ownKind(one); ok {
					return k, true
				}
			}
			return KindUnknown, false
		default:
			return KindUnknown, false
		}
	}
	return KindUnknown, false
}

func usage(addr Addr, err error) *Error {
	return &Error{Addr: addr, Stage: StageUsage, Kind: KindUsage, Err: err}
}

func (p *Pool) failed(addr Addr, stage Stage, err error, start clock.Instant) *Error {
	p.mu.Lock()
	e := p.failedLocked(addr, stage, err, start)
	p.mu.Unlock()
	return e.classify()
}

// classify completes an error that was made under Pool.mu. The methods of an error
// are foreign code, which may use the pool, so they are called with no lock held.
func (e *Error) classify() *Error {
	if e.Stage == StageUsage {
		return e
	}
	e.Kind, e.Err = KindOf(e.Err), spent(e.Err)
	e.elsewhere = e.elsewhere && errors.Is(e.Err, ErrNoneRemovable)
	return e
}

// tooLate is the error of a borrow whose ctx was done before it began. It has
// waited for nothing.
func (p *Pool) tooLate(ctx context.Context, addr Addr) *Error {
	e := p.failed(addr, StageWait, causeOf(ctx), 0)
	e.Limit, e.LimitName = 0, ""
	return e
}
