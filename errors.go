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

	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// Sentinels, for [errors.Is].
var (
	// ErrClosed means that the pool was closed (or is the zero Pool, which was never
	// opened). Make a new one with [New].
	ErrClosed = errors.New("connpool: pool is closed")

	// ErrReturned means that a [Conn] was used after its loan ended, or after it was
	// detached.
	ErrReturned = errors.New("connpool: connection was given back: a Conn is valid only until fn returns")

	// ErrExhausted means that a limit was reached and the borrow does not wait:
	// Config.WhenFull is [FullFail], or MaxWaiters borrowers wait already.
	ErrExhausted = errors.New("connpool: limit reached")

	// ErrSessionLost means that the connection a [Pool.Session] kept for an address is no
	// longer usable: it died or received unexpected bytes between two uses, or the use
	// around this one broke or closed it. The session reports this instead of opening
	// another connection silently, because the work begun on the old one is lost. The
	// next use gets another connection.
	ErrSessionLost = errors.New("connpool: the session's connection is lost")

	// ErrUnread means that unrequested bytes were waiting on a connection. It is the
	// error of an idle connection closed for that reason, of a failed Config.Setup, or of
	// a loan whose connection was not kept. A [Prober] returns it to pass the bytes to
	// Config.Push.
	ErrUnread = errors.New("connpool: bytes were waiting that nobody had asked for")

	// ErrNoneRemovable means that the process ran out of file handles and no idle
	// connection was left that the pool could close to free one.
	ErrNoneRemovable = errors.New("connpool: out of handles, and no idle connection is left to close")
)

// noHandle is the error of a dial that lacked a file handle while the pool had no idle
// connection to close for one.
type noHandle struct{ err error }

func (e *noHandle) Error() string   { return ErrNoneRemovable.Error() + ": " + e.err.Error() }
func (e *noHandle) Unwrap() []error { return []error{ErrNoneRemovable, e.err} }

// Stage tells how far a borrow got before it failed.
type Stage uint8

const (
	StageUsage     Stage = iota + 1 // the arguments: nothing was tried
	StageWait                       // waiting for a connection or for room for one
	StageBackoff                    // the address failed repeatedly; a new dial is not due yet
	StageDial                       // opening the socket
	StageHandshake                  // the TLS handshake
	StageSetup                      // Config.Setup
	StageSession                    // the session of ctx: its connection is lost, or another goroutine of the session still uses it
	StageLimits                     // Config.LimitsFor: nothing else was tried
)

var stageNames = [...]string{StageUsage: "usage", StageWait: "wait", StageBackoff: "back-off",
	StageDial: "dial", StageHandshake: "handshake", StageSetup: "setup", StageSession: "session", StageLimits: "limits"}

func (s Stage) String() string { return nameOf(stageNames[:], s) }

// Kind classifies an error by what went wrong, whichever layer reported it.
type Kind uint8

const (
	// None of the other kinds; also the kind of nil.
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
	KindTimeout                // the time ran out before any byte was transferred
	KindTimeoutInTransfer      // the time ran out in the middle of an exchange: the connection is out of step
	KindUsage                  // a mistake of the caller
)

var kindNames = [...]string{KindUnknown: "unknown", KindAccess: "access", KindAddress: "address",
	KindBadMessage: "bad message", KindBroken: "broken", KindEOF: "eof", KindLookup: "lookup",
	KindInternal: "internal", KindCanceled: "canceled", KindRefused: "refused", KindResource: "resource",
	KindTimeout: "timeout", KindTimeoutInTransfer: "timeout in transfer", KindUsage: "usage"}

func (k Kind) String() string { return nameOf(kindNames[:], k) }

// MarshalText returns the same text as String.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

func nameOf[T ~uint8](names []string, v T) string {
	if int(v) < len(names) && names[v] != "" {
		return names[v]
	}
	return fmt.Sprintf("%T(%d)", v, v)
}

// Error is what the methods of a [Pool] return when they could not get a connection:
// [Pool.With] when fn never ran, and also [Pool.Lease], [Lease.Do], [Pool.Warm] and
// [Pool.DialContext]; [Pool.SetLimits] and [Pool.Shutdown] return one of [StageUsage] for
// a mistake in their arguments. (An fn that itself borrows from a pool may return the
// *Error of that borrow.)
type Error struct {
	Addr   Addr
	Stage  Stage
	Kind   Kind
	Waited time.Duration // since With was called

	// The counts of the address when the borrow failed, and the limit that delayed it:
	// Limit is the value of the limit LimitName (0 and "" if no limit was in the way).
	Open, InUse, Idle, Waiting int
	Limit                      int
	LimitName                  string

	Err error // never nil

	elsewhere bool // handles ran out while the pool had nothing open
	ownLimit  bool // Config.LimitsFor set the limit
}

// Error describes in one line what failed, how long the borrow tried, and what to change.
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

// adviseOnLimit writes how full the limit is that was in the way, and how to avoid that.
func (e *Error) adviseOnLimit(b *strings.Builder) {
	name := e.LimitName
	if e.ownLimit {
		name = ownName(name)
	}
	switch e.LimitName {
	case "MaxWaiters":
		fmt.Fprintf(b, " (%d of %d waiting; raise %s", e.Waiting, e.Limit, name)
	case "MaxDialing", "MaxDialingPerAddr":
		fmt.Fprintf(b, " (%d dials of %d under way, %d waiting; raise %s", e.Limit, e.Limit, e.Waiting, name)
	case "MaxIdle":
		fmt.Fprintf(b, " (no more than %d may be idle; raise %s, or warm fewer)", e.Limit, name)
		return
	default:
		fmt.Fprintf(b, " (%d of %d in use, %d waiting; raise %s", e.InUse, e.Limit, e.Waiting, name)
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

// ownName is what LimitsFor calls the limit of an address that Config calls name.
func ownName(name string) string {
	own := map[string]string{"MaxPerAddr": "MaxOpen", "MaxIdlePerAddr": "MaxIdle", "MaxDialingPerAddr": "MaxDialing", "MaxWaiters": "MaxWaiters"}
	return "the " + own[name] + " that Config.LimitsFor gives"
}

func (e *Error) Unwrap() error { return e.Err }

// Timeout reports whether the borrow ran out of time.
func (e *Error) Timeout() bool { return e.Kind == KindTimeout }

// Temporary makes e a net.Error. It reports whether the borrow ran out of time, or the
// process ran out of a resource.
func (e *Error) Temporary() bool { return e.Kind == KindTimeout || e.Kind == KindResource }

var _ net.Error = (*Error)(nil)

// As gives errors.As a *net.OpError, as package net's dialer would return: the OpError of
// the dial if there was one, else one with the Op "dial" that wraps e.
func (e *Error) As(target any) bool {
	if op, ok := target.(**net.OpError); ok {
		if !errors.As(e.Err, op) {
			*op = e.opError("", "")
		}
		return true
	}
	return hideKeepMark(target)
}

// PanicError is a panic (or, with a nil Value, a runtime.Goexit) of foreign code
// that ran on a goroutine of the pool's own: a dialer, a hook, a callback of
// tls.Config, a method of a dialer's connection or of the state.
type PanicError struct {
	Where string // "Config.Setup", "Config.Dialers[tcp]", ...
	Value any
	Stack []byte

	cause error // Value, if it is an error whose methods can be called safely
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
	err, _ := e.Value.(error) // a PanicError made by another package has no cause
	return spent(err)
}

// textOf returns the text of err in one line.
func textOf(err error) string {
	if err == nil {
		return "no error"
	}
	return oneLine(err.Error())
}

// oneLine joins the lines of text with "; ". A log expects one line for each error, and
// errors.Join and the texts of peers have several.
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

// ioError is a timeout inside a loan. It adds two facts that the socket's error lacks:
// whose time ran out (the operation's or the ctx's), and whether bytes had moved.
type ioError struct {
	kind  Kind
	cause error // the ctx's error if the ctx ended, else nil
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

// KindOf classifies any error: of With, of a Conn's methods, of package net, crypto/tls
// or the operating system.
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
		return KindRefused // if the Unix socket does not exist, nobody listens there either
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
		if strings.HasPrefix(err.Error(), "tls: ") { // most errors of crypto/tls have no type
			return KindBadMessage
		}
	}
	return KindUnknown
}

// inTransfer reports whether err comes from an operation on an open connection and not
// from a dial. A timeout that the system reports during an operation is the end of the
// connection.
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

// ownKind returns the Kind of the outermost error in err that a pool made. Errors further
// in, such as the cause of a ctx or the error of the last dial, may be of another kind,
// and may come from another pool.
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

// classify completes an error that was made under Pool.mu. The methods of the wrapped
// error are foreign code that may use the pool, so classify calls them with no lock held.
func (e *Error) classify() *Error {
	if e.Stage == StageUsage {
		return e
	}
	e.Kind, e.Err = KindOf(e.Err), spent(e.Err)
	e.elsewhere = e.elsewhere && errors.Is(e.Err, ErrNoneRemovable)
	return e
}

// ctxError is the error of a ctx that has a cause.
type ctxError struct{ err, cause error }

func (e *ctxError) Error() string   { return oneLine(e.err.Error() + ": " + e.cause.Error()) }
func (e *ctxError) Unwrap() []error { return []error{e.err, spent(e.cause)} }

// causeOf is why ctx is done: its error, with the cause if the cause says more.
func causeOf(ctx context.Context) error {
	err := ctx.Err()
	if cause := sanitizeError(context.Cause(ctx)); cause != nil && !errors.Is(cause, err) {
		return &ctxError{err, cause}
	}
	return err
}

// dialError is the failure of a dial with its stage, for a waiter.
type dialError struct {
	stage Stage
	err   error

	local    bool // see isLocal
	noHandle bool // the failure is ErrNoneRemovable
}

// failedDial makes a dialError. It asks err everything that the pool needs to know of it
// under Pool.mu, where the methods of err, which is foreign code, must not be called.
func failedDial(stage Stage, err error) *dialError {
	e := &dialError{stage: stage, err: err, noHandle: errors.Is(err, ErrNoneRemovable)}
	e.local = e.isLocal()
	return e
}

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// isLocal reports whether the dial failed for want of something local, which says nothing
// about the peer. An error from Setup, or of another pool, is never local: it may report
// what another pool, or a server that Setup has asked, lacked.
func (e *dialError) isLocal() bool {
	var other *Error
	if e.stage == StageSetup || errors.As(e.err, &other) {
		return false
	}
	kind := KindOf(e.err)
	return kind == KindResource || kind == KindUsage
}

// backlogFull is the error of a wait for a server that does not accept.
type backlogFull struct{ err error }

func (e *backlogFull) Error() string {
	return "the server's backlog is full, it does not accept fast enough: " + e.err.Error()
}

func (e *backlogFull) Unwrap() error { return e.err }
