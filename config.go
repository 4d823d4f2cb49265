package connpool

import (
	"context"
	"crypto/tls"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"runtime/pprof"
	"time"
)

// DialFunc opens a connection to addr. It must honour ctx, which is done
// after DialTimeout or when the pool closes, and must return either a
// connection or an error. It may run many times at once. The QoS of addr is
// its business: [QoS.Control] sets what must be set before connecting.
type DialFunc func(ctx context.Context, addr Addr) (net.Conn, error)

// FullPolicy says what a borrower meets when nothing is idle and a limit
// forbids to open one more.
type FullPolicy uint8

const (
	FullWait     FullPolicy = iota // queue, first come first served, until ctx is done
	FullFail                       // ErrExhausted at once
	FullOverflow                   // open one more than MaxPerAddr or MaxOpen; what is too much is closed when given back
)

func (f FullPolicy) String() string { return nameOf([]string{"wait", "fail", "overflow"}, f) }

// Config shapes a pool. The zero Config is good. For every number and
// duration 0 means the default that is stated here, and a negative value
// switches the thing off. A duration below a millisecond is refused, since it lacks
// its unit as a rule. New copies it; later changes have no effect. The fields stand
// in six blocks: limits, time, opening a connection, keeping it clean, watching, and
// what is rare; [Pool.SetLimits] changes those of the first but MaxUses and WhenFull.
type Config struct {
	// # Limits on connections: how many connections, dials, waiters and loans there may be
	//
	// MaxOpen limits the connections of the whole pool, idle, in use, being
	// opened or being closed. When it is reached, the least recently used
	// idle connection of any address makes room.
	// 0: what the process's limit on file handles leaves, less an eighth, 16
	// at least (but never more than half); no limit where the system
	// has none, as on Windows. Negative: no limit.
	MaxOpen int

	// MaxPerAddr limits the connections of one address in the same way.
	// 0 or negative: only MaxOpen limits.
	MaxPerAddr int

	// MaxIdle and MaxIdlePerAddr limit the connections kept while nobody
	// uses them; one too many is closed when it is given back.
	// 0: no limit of its own; negative: none is kept, every use dials.
	MaxIdle        int
	MaxIdlePerAddr int

	// MaxDialing limits the dials under way at once (with handshake and
	// Setup), MaxDialingPerAddr those to one address. An address that swallows
	// packets leaves room for the others in any case: where slots or dials are
	// scarce it has to share, and evicts nothing for a second dial.
	// 0: 64, and half of MaxDialing, rounded up; negative: no limit (for
	// MaxDialingPerAddr: none but MaxDialing).
	MaxDialing        int
	MaxDialingPerAddr int

	// MaxWaiters limits how many borrowers of one address may wait for a
	// connection while no dial is under way that could serve them. One more
	// gets ErrExhausted at once. 0 or negative: no limit.
	MaxWaiters int

	// MinIdlePerAddr is how many idle connections (min idle) are kept in reserve for
	// each address that is in use. When a loan leaves fewer idle, the next
	// connection is opened in the background, so that the next borrower need
	// not wait for it. The reserve outlives IdleTimeout, is checked like every
	// idle connection, and is refilled when a connection of it dies. While the
	// address fails, hangs up at once or speaks at once, the reserve is tried
	// with one dial per SweepInterval, and one for each new connection that
	// proves good in a loan. The reserve never takes room from a borrower or
	// from another address. When it was evicted, the next loan of its address
	// restores it. An address that nobody borrowed from for ten times
	// IdleTimeout (20 minutes if that is off) loses its reserve.
	// 0 or negative: none.
	MinIdlePerAddr int

	// MaxUses limits how often one connection is lent. 0 or negative: no
	// limit. 1 makes every use dial, and is the right setting for a
	// protocol that matches replies by position and a peer that is not
	// trusted.
	MaxUses int

	// WhenFull says what a borrower meets when nothing is idle and MaxPerAddr or
	// MaxOpen forbids to open one more: FullWait (the default), FullFail or FullOverflow.
	WhenFull FullPolicy

	// # Time: how long a connection is kept, how long a dial may take, how often the pool looks
	//
	// IdleTimeout is how long a connection is kept unused; one that is
	// older is never lent, MinIdlePerAddr apart. Time that the machine slept counts.
	// 0: 2 minutes; negative: for ever.
	IdleTimeout time.Duration

	// MaxLifetime is how old a connection may become. Up to a tenth of it,
	// drawn for each connection when it is opened, is subtracted, so that
	// what was opened together does not expire together. A loan is never
	// interrupted for it. 0 or negative: no limit.
	MaxLifetime time.Duration

	// DialTimeout bounds opening a connection: dial, handshake and Setup
	// together. 0: 10 seconds; negative: no bound.
	DialTimeout time.Duration

	// SweepInterval is the period of the sweep, which looks for idle
	// connections that died or expired. 0: 20 seconds; negative: no sweep,
	// so that such a connection is found when its turn to be lent comes.
	SweepInterval time.Duration

	// # Opening a connection: how it is made, and what is done before its first loan
	//
	// Dialers opens the connections of the transports it names, in the
	// place of the pool's own for TCP, TLS and Unix. Under TLS the dialer
	// of TCP, if there is one, opens the connection that the handshake runs
	// on, while a dialer of TLS does the handshake itself.
	Dialers map[Transport]DialFunc

	// TLS is the pool's identity and trust. It is cloned for each address:
	// ServerName is that of the address, and must be empty here. (localhost is
	// allowed: it is the name of 127.0.0.1, ::1 and the other addresses of the
	// loopback interface that have no ServerName of their own.) ClientSessionCache is one of
	// the address alone, so that no session crosses from one identity to
	// another (SessionTicketsDisabled switches resumption off). nil: the
	// zero tls.Config, which trusts the system's roots.
	//
	// A connection that resumes a session keeps the client certificate and
	// the proof of the peer's identity from the handshake in which the
	// session was made. crypto/tls calls neither GetClientCertificate nor
	// VerifyPeerCertificate for it. So with one of these two functions set
	// the pool resumes no session, unless ClientSessionCache is set too
	// (the pool does not use that cache; it only says that the functions
	// may be skipped). VerifyConnection runs for every connection. After a
	// change of what such a function does or returns, call [Pool.Retire]:
	// it ends the connections and the sessions from before.
	TLS *tls.Config

	// TLSFor replaces TLS where identity or trust depends on the address,
	// say on its Scope. It runs once per dial; a nil result means TLS. What
	// it returns is copied, once per address for as long as it returns the
	// same, and must not be changed later. Another pointer is another
	// identity: no session made with the one before is resumed under it.
	// So return the same pointer for as long as nothing changes; with a new
	// one for each dial no session is ever resumed.
	TLSFor func(Addr) (*tls.Config, error)

	// Setup runs once per connection, before its first loan, to log in or
	// greet. nc works during Setup and later whenever the connection is
	// lent, and is otherwise dead (ErrReturned): a codec built over it may
	// live in the returned state as long as the connection does. ctx is
	// bounded by DialTimeout and carries the values of the ctx of the
	// borrower that made the pool dial. An error destroys the connection
	// and is that borrower's alone. But who logs in with what those values
	// say shares the fate of its address: the connection may serve another
	// borrower, and failures of one make the address back off for all. A
	// Scope for each user keeps them apart. A state that is an io.Closer is
	// closed with the connection.
	//
	// Setup must read all that the peer has said, and flush what it wrote:
	// bytes that are left in its state, in crypto/tls or in the socket fail
	// the dial (with a Push, those to be read are Push's, before the first
	// loan). A peer that speaks first needs a Setup that reads this; without
	// one its greeting is the first borrower's.
	//
	// When the connection is given back, the state must hold no bytes that
	// were read and not used, or written and not flushed; else it is closed.
	// The pool asks a method Buffered() int, which a codec with two halves
	// answers with the sum of both (with a Push, only of what was read), and
	// looks at what is a *bufio.Reader, Writer or ReadWriter in the state:
	// itself, its fields, exported or not, structs inside it or embedded, and
	// what net/textproto makes; and it asks a *json.Decoder, in the same places,
	// for what it has read ahead. Of buffers elsewhere it cannot know.
	Setup func(ctx context.Context, addr Addr, nc net.Conn) (state any, err error)

	// # Keeping it clean: what is done with an open connection between two loans
	//
	// Reset runs when a connection is given back in good order, before it
	// goes idle or to the next borrower, on the borrower's time: to roll
	// back, to restore a session's defaults. An error, or more time than
	// HookTimeout, closes the connection and is not the borrower's.
	Reset func(ctx context.Context, c Conn) error

	// Check is a ping of the protocol. It runs before a loan if the
	// connection has been idle for longer than CheckAfterIdle, and in each
	// sweep. An error, or more time than HookTimeout, closes the connection;
	// the borrower gets another.
	Check func(ctx context.Context, c Conn) error

	// CheckAfterIdle is how long after its last use (or Check) a connection is
	// lent without asking Check. 0: SweepInterval, or 20 seconds if that is
	// off; negative: no trust, Check precedes every loan of a connection
	// that has been lent before.
	CheckAfterIdle time.Duration

	// Push gets what a peer sends while the connection is idle. Where the
	// pool finds bytes on an idle connection it does not close it, but lends
	// it to Push, as to a borrower, on a goroutine of its own. Push reads a
	// message, or more; nil gives the connection back, and if something is
	// left, Push is called again. An error closes the connection, and so does
	// more time than HookTimeout, or nil without having read anything. ctx is
	// done with the pool, or after HookTimeout; it has no values. What the
	// state has buffered of a borrower's last read is something to read, too.
	//
	// On Linux Push is called when something arrives; elsewhere, and for a
	// [Prober], when the connection's turn to be lent or a sweep comes.
	// Session tickets of TLS alone are nothing to read. What arrives between
	// the look before a loan and the loan's end is the borrower's: in a
	// protocol whose peers speak unasked borrowers must know such messages
	// as Push does. And the pool cannot tell a message from the rest of a
	// reply that a borrower left unread: Push must, and return an error.
	Push func(ctx context.Context, c Conn) error

	// HookTimeout bounds one run of Reset, Check or Push. 0: 5 seconds;
	// negative: no bound.
	HookTimeout time.Duration

	// # Watching: who is told what the pool does
	//
	// Logger gets what an operator should know: connections lost while
	// idle, addresses that fail, hooks that break their contract. nil: no
	// log.
	Logger *slog.Logger

	// Trace observes the pool. nil: nobody does. WithTrace observes one use.
	Trace *Trace

	// HoldWarn is how long a connection may be out, in one loan, lease or
	// session, before the pool reports it, once, with the place where it was
	// borrowed: to Trace.HeldLong, and to Logger as a warning. Nothing is
	// taken from anybody. It costs a walk up the stack for each borrow.
	// 0 or negative: no report.
	HoldWarn time.Duration

	// Profile gets each connection that is out, with the stack of its
	// borrow, for go tool pprof: a profile made with pprof.NewProfile is
	// served by net/http/pprof under its name. nil: none.
	Profile *pprof.Profile

	// Debug keeps the stack of each borrow and reports the use of a Conn
	// after its loan to Logger, with the stacks of both. The pool audits
	// its books as it goes, and whenever Stats is called, and panics if
	// they contradict themselves. It costs some microseconds a loan.
	Debug bool

	// # Rare: what nearly every program leaves alone
	//
	// NoneRemovable is asked, unless the ctx of the borrower brings its own
	// (WithNoneRemovable), when file handles ran out and no idle
	// connection is left to close. true says that a handle was freed and
	// the dial shall be tried once more; false, or nil, fails the borrow
	// with an error that is ErrNoneRemovable.
	NoneRemovable func(*Error) bool

	// NoProbe switches off the look into the socket that precedes each
	// loan, and the sweep's. A connection that the peer closed, or on which
	// it sent something unasked, is then lent. It is meant for protocols
	// whose every exchange begins with a ping anyway.
	NoProbe bool

	// NoFDCheck switches off the check, at each loan and before each close,
	// that the descriptor is still the socket that was dialled. It is meant
	// for programs that are sure that nothing in them closes descriptors
	// it does not own.
	NoFDCheck bool
}

const (
	defaultMaxDialing    = 64
	defaultIdleTimeout   = 2 * time.Minute
	defaultDialTimeout   = 10 * time.Second
	defaultSweepInterval = 20 * time.Second
	defaultHookTimeout   = 5 * time.Second
)

// century is as long as any duration of a Config gets. Longer ones, which are
// meant as "for ever", would overflow as soon as something is added to them.
const century = 100 * 365 * 24 * time.Hour

// configError is that of New: the caller's mistake.
type configError struct{ err error }

func (e *configError) Error() string   { return e.err.Error() }
func (e *configError) Unwrap() []error { return []error{e.err, fs.ErrInvalid} }

// shortest is the least duration that anybody can mean. Below it there are only
// numbers without a unit: 30 is 30 nanoseconds.
const shortest = time.Millisecond

// meant says what in cfg makes sense to the pool, but cannot be meant.
func (cfg *Config) meant() error {
	for _, d := range [...]struct {
		name string
		is   time.Duration
	}{
		{"IdleTimeout", cfg.IdleTimeout},
		{"MaxLifetime", cfg.MaxLifetime},
		{"DialTimeout", cfg.DialTimeout},
		{"SweepInterval", cfg.SweepInterval},
		{"CheckAfterIdle", cfg.CheckAfterIdle},
		{"HookTimeout", cfg.HookTimeout},
		{"HoldWarn", cfg.HoldWarn},
	} {
		if d.is > 0 && d.is < shortest {
			return fmt.Errorf("connpool: Config.%s is %v, less than a millisecond: give it a unit, as in %d * time.Second", d.name, d.is, d.is)
		}
	}
	if cfg.TLS != nil && cfg.TLS.ServerName != "" && !isLocalhost(cfg.TLS.ServerName) {
		return fmt.Errorf("connpool: Config.TLS.ServerName is %q, but each address has its own: leave it empty, and write the name into Addr.ServerName (?server-name= in its text)",
			cfg.TLS.ServerName)
	}
	if cfg.Profile != nil && !takesEntries(cfg.Profile) {
		return fmt.Errorf("connpool: Config.Profile, %q, is one of the runtime's own or was not made: use pprof.NewProfile", cfg.Profile.Name())
	}
	return nil
}

// takesEntries reports whether an entry can be added to a profile: package pprof
// panics where none can.
func takesEntries(to *pprof.Profile) (yes bool) {
	defer func() { yes = recover() == nil }()
	entry := new(byte)
	to.Add(entry, 0)
	to.Remove(entry)
	return true
}

// resolved is cfg with every default filled in: a limit that is off is
// math.MaxInt, a duration that is off is 0, and none is longer than a century. MaxOpen alone keeps its 0, which
// stands for the limit that the handles give at the time.
func (cfg Config) resolved() (Config, error) {
	senseless := func(a, b, why string) (Config, error) {
		return Config{}, fmt.Errorf("connpool: Config.%s and Config.%s contradict each other: %s", a, b, why)
	}
	switch {
	case cfg.WhenFull > FullOverflow:
		return Config{}, fmt.Errorf("connpool: Config.WhenFull is %d: use FullWait, FullFail or FullOverflow", cfg.WhenFull)
	case cfg.Push != nil && cfg.NoProbe:
		return senseless("Push", "NoProbe", "without a look nobody sees what there is to push")
	case cfg.CheckAfterIdle != 0 && cfg.Check == nil:
		return senseless("CheckAfterIdle", "Check", "there is no Check to leave out")
	}
	limits, err := cfg.limits().resolved("Config", cfg.WhenFull)
	if err != nil {
		return Config{}, err
	}
	cfg.setLimits(limits)
	for t, d := range cfg.Dialers {
		if err := t.validate(); err != nil {
			return Config{}, fmt.Errorf("connpool: Config.Dialers: %w", err)
		}
		if d == nil {
			return Config{}, fmt.Errorf("connpool: Config.Dialers[%q] is nil", t)
		}
	}

	span := func(d *time.Duration, zero time.Duration) {
		switch {
		case *d == 0:
			*d = zero
		case *d < 0:
			*d = 0
		}
		*d = min(*d, century)
	}
	if cfg.MaxUses <= 0 {
		cfg.MaxUses = math.MaxInt
	}
	span(&cfg.IdleTimeout, defaultIdleTimeout)
	span(&cfg.MaxLifetime, 0)
	span(&cfg.DialTimeout, defaultDialTimeout)
	span(&cfg.SweepInterval, defaultSweepInterval)
	span(&cfg.HookTimeout, defaultHookTimeout)
	span(&cfg.HoldWarn, 0)
	switch {
	case cfg.CheckAfterIdle < 0:
		cfg.CheckAfterIdle = 0
	case cfg.CheckAfterIdle == 0:
		if cfg.CheckAfterIdle = cfg.SweepInterval; cfg.CheckAfterIdle == 0 {
			cfg.CheckAfterIdle = defaultSweepInterval
		}
	}
	cfg.CheckAfterIdle = min(cfg.CheckAfterIdle, century)
	dialers := make(map[Transport]DialFunc, len(cfg.Dialers))
	for t, d := range cfg.Dialers {
		dialers[t] = d
	}
	cfg.Dialers = dialers
	if cfg.TLS != nil {
		cfg.TLS = cfg.TLS.Clone()
	}
	return cfg, nil
}
