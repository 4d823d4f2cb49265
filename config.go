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
	"strings"
	"time"
)

// DialFunc opens a connection to addr. It must honour ctx, which is done after
// DialTimeout or when the pool closes, and must return either a connection or an error.
// Several calls may run at once. The pool does not set the QoS of addr on the
// connection: [QoS.Control] sets what must be set before connecting.
type DialFunc func(ctx context.Context, addr Addr) (net.Conn, error)

// FullPolicy says what happens to a borrower when no connection is idle and a limit
// forbids to open one more.
type FullPolicy uint8

const (
	FullWait     FullPolicy = iota // the borrower waits in a queue, first come first served, until ctx is done
	FullFail                       // the borrower fails with ErrExhausted at once
	FullOverflow                   // the pool opens one more than MaxPerAddr or MaxOpen; a surplus connection is closed when it is given back
)

func (f FullPolicy) String() string { return nameOf([]string{"wait", "fail", "overflow"}, f) }

// Config configures a pool. The zero Config is a good choice. For every number and
// duration, 0 means the default that is stated here, and a negative value switches the
// feature off. New refuses a positive duration below a millisecond, since usually its
// unit was forgotten. New copies the Config; later changes have no effect. The fields
// are in six blocks: limits, time, opening a connection, keeping it clean, watching,
// and rare ones. [Pool.SetLimits] changes the limits of the first block, all that are
// numbers but MaxUses.
type Config struct {
	// # Limits on connections: how many connections, dials, waiters and loans there may be
	//
	// MaxOpen limits the connections of the whole pool: idle, in use, being opened or
	// being closed. When the limit is reached, the pool closes the least recently used
	// idle connection of any address to make room. 0: the process's limit on file
	// handles, less an eighth of it (at least 16, but never more than half); no limit
	// where the system has none, as on Windows. Negative: no limit.
	MaxOpen int

	// MaxPerAddr limits the connections of one address in the same way.
	// 0 or negative: only MaxOpen limits.
	MaxPerAddr int

	// MaxIdle and MaxIdlePerAddr limit the connections that are kept while nobody uses
	// them. A connection above the limit is closed when it is given back. 0: no limit
	// of its own; negative: no connection is kept, and every use dials.
	MaxIdle        int
	MaxIdlePerAddr int

	// MaxDialing limits the dials in flight (each with handshake and Setup),
	// MaxDialingPerAddr those to one address. An address whose packets are dropped
	// cannot use up the limits: where slots or dials are scarce, it has to share them,
	// and evicts nothing for a second dial. 0: 64, and half of MaxDialing, rounded up;
	// negative: no limit (for MaxDialingPerAddr: only that of MaxDialing).
	MaxDialing        int
	MaxDialingPerAddr int

	// MaxWaiters limits how many borrowers of one address may wait for a connection
	// while no dial is in flight that could serve them. The next borrower fails with
	// ErrExhausted at once. 0 or negative: no limit.
	MaxWaiters int

	// MinIdlePerAddr (min idle) is how many idle connections are kept in reserve for
	// each address that is in use. When a loan leaves fewer idle, the pool opens the
	// next connection in the background, so that the next borrower need not wait for
	// it. The reserve outlives IdleTimeout, is checked like every idle connection, and
	// is refilled when one of its connections dies. While dials to the address fail, or
	// the peer hangs up or sends unrequested bytes on new connections at once, the pool
	// tries to refill the reserve with one dial per SweepInterval, and one for each new
	// connection that proves good in a loan. The reserve never takes room from a
	// borrower or from another address. When it was evicted, the next loan of its
	// address restores it. An address that nobody has borrowed from for ten times
	// IdleTimeout (20 minutes if IdleTimeout is off) loses its reserve. 0 or negative:
	// none.
	MinIdlePerAddr int

	// LimitsFor gives an address limits of its own, in the place of those that are the
	// same for every address: one device takes one connection, another four. A field of
	// its answer that is 0 is the pool's, so the zero AddrLimits changes nothing. The
	// limits of the whole pool (MaxOpen, MaxIdle, MaxDialing) hold over all addresses
	// together. LimitsFor is asked with the canonical address when the pool gets to know
	// it, at its first borrow or Warm, again when the pool has forgotten it in the
	// meantime, and after each [Pool.SetLimits]. It must give the same answer until then, must
	// be quick (it gets a quarter of a second), and must not borrow from the pool. If it
	// fails, panics, does not return, or answers what contradicts itself, that borrower
	// gets an [*Error] of [StageLimits], and the next one asks again. It does not apply
	// to DialContext. nil: no address has limits of its own.
	LimitsFor func(Addr) (AddrLimits, error)

	// MaxUses limits how often one connection is lent. 0 or negative: no limit. With 1
	// every use dials, which is the right setting for a protocol that matches replies
	// by position with a peer that is not trusted.
	MaxUses int

	// WhenFull says what happens to a borrower when no connection is idle and
	// MaxPerAddr or MaxOpen forbids to open one more: FullWait (the default), FullFail
	// or FullOverflow.
	WhenFull FullPolicy

	// # Time: how long a connection is kept, how long a dial may take, how often the pool sweeps
	//
	// IdleTimeout is how long a connection is kept unused. A connection that has been
	// idle for longer is never lent, except those of MinIdlePerAddr. Time that the
	// machine slept counts. 0: 2 minutes; negative: no bound.
	IdleTimeout time.Duration

	// MaxLifetime is how old a connection may become. For each connection the pool
	// subtracts a random part, up to a tenth, so that connections opened together do
	// not expire together. A loan is never interrupted for it. 0 or negative: no limit.
	MaxLifetime time.Duration

	// DialTimeout bounds opening a connection: dial, handshake and Setup
	// together. 0: 10 seconds; negative: no bound.
	DialTimeout time.Duration

	// WaitTimeout bounds how long a borrower waits in the queue, for a slot or for a dial,
	// if its ctx does not end sooner. Then the borrow fails with an *[Error] of StageWait
	// that is a time-out and context.DeadlineExceeded, and says what the wait was for. A
	// dial under way goes on, for the next borrower. DialContext has the same bound. Other
	// waits have their own: a Check before a loan HookTimeout, the turn of a session and
	// Warm their ctx. 0 or negative: only ctx ends the wait.
	WaitTimeout time.Duration

	// MaxBackoff is the longest pause between two dials to an address that failed three
	// times in a row. The pauses begin with 50 milliseconds (or MaxBackoff, if that is
	// shorter) and double; up to half of each is taken away at random. 0: 1 second, and 8
	// seconds where the peer accepts and hangs up at once. Negative: no pauses: each
	// borrower's dial starts as soon as the limits allow.
	MaxBackoff time.Duration

	// SweepInterval is the period of the sweep, which looks for idle connections that
	// died or expired. 0: 20 seconds; negative: no sweep, so such a connection is found
	// only when it is about to be lent.
	SweepInterval time.Duration

	// FollowDNS makes connections follow the host name of their address. In each sweep,
	// the pool looks up the names that have open connections, once for each name and
	// family (IPv4, IPv6) of these. A connection whose own peer is missing in two good
	// answers in a row is retired: it is closed now if it is idle, and when it is given
	// back if it is in use. The reason is ClosedMoved. A look-up that fails, that ends
	// without any address, or that takes longer than 10 seconds, changes nothing, so a
	// name that is deleted keeps its connections. Some servers answer with a few of many
	// addresses at a time. So two answers that exchange addresses for others do not count
	// together, it takes three answers after an exchange of a part, and when the answers
	// of a name keep exchanging addresses, a connection is retired only if its peer is
	// missing for several times longer than any address was that came back.
	//
	// The resolver is that of Dialer, or net.DefaultResolver. It is asked with the host
	// as a dial is; 16 look-ups may run at once. Only connections that the pool's own
	// dialer opened for TCP and TLS are followed. One of Dialers may lead through a
	// proxy; a connection of DialContext belongs to a library; an IP address and a Unix
	// socket have no name. New refuses FollowDNS without a sweep. false: off, a name is
	// looked up in each dial only.
	FollowDNS bool

	// # Opening a connection: how it is made, and what is done before its first loan
	//
	// Dialers open the connections of the transports that are named, instead of the
	// pool's own dialers for TCP, TLS and Unix. For TLS, a dialer of TCP, if there is
	// one, opens the connection for the handshake; a dialer of TLS does the handshake
	// itself.
	Dialers map[Transport]DialFunc

	// Dialer is the base of the pool's own dials of TCP, TLS and Unix sockets, those of
	// [Pool.DialContext] included: its LocalAddr, Resolver, FallbackDelay, keep-alive and
	// multipath settings, and its Control or ControlContext, which runs before the pool
	// sets the QoS of the address. The keep-alive of the address, if it has one, replaces
	// that of Dialer. LocalAddr is left out where its network is another one, and a port in
	// it allows one connection at a time. Timeout and Deadline hold beside DialTimeout.
	// Its functions may run in several dials at once. Dialers replaces Dialer for the
	// transports that it names. nil: the zero net.Dialer.
	Dialer *net.Dialer

	// TLS is the pool's identity and trust. The pool clones it for each address. In the
	// clone, ServerName is that of the address; so ServerName must be empty here.
	// (localhost is allowed: it is the name of 127.0.0.1, ::1 and the other addresses
	// of the loopback interface that have no ServerName of their own.)
	// ClientSessionCache in the clone is one for the address alone, so no session is
	// resumed under another identity (SessionTicketsDisabled switches resumption off).
	// nil: the zero tls.Config, which trusts the system's roots.
	//
	// A connection that resumes a session keeps the client certificate and the proof of
	// the peer's identity from the handshake in which the session was made. crypto/tls
	// then calls neither GetClientCertificate nor VerifyPeerCertificate. So if one of
	// these two functions is set, the pool resumes no session, unless
	// ClientSessionCache is set too (the pool does not use that cache; setting it only
	// says that the functions may be skipped). VerifyConnection runs for every
	// connection. After a change of what such a function does or returns, call
	// [Pool.Retire]: it ends the connections and the sessions from before.
	TLS *tls.Config

	// TLSFor replaces TLS where identity or trust depends on the address, for example
	// on its Scope. It runs once per dial; if it returns nil, TLS is used. The pool
	// copies the result, once per address for as long as TLSFor returns the same
	// pointer; the result must not be changed later. Another pointer is another
	// identity: no session made under the earlier one is resumed under it. So return
	// the same pointer for as long as nothing changes; with a new one for each dial no
	// session is ever resumed.
	TLSFor func(Addr) (*tls.Config, error)

	// TLSExpiry makes a TLS connection end with the certificates it was made with: the
	// client certificate that its handshake presented, if the server asked for one, with
	// its intermediates, and the chain by which the server was verified. The connection is
	// not lent after the first of them has expired, less a random part of up to a tenth of
	// the time that was left, so that connections do not expire together; the reason is
	// ClosedExpired. A dial fails if the leaf of the client certificate has expired
	// already, even if the server does not mind. An intermediate that has expired already
	// does not count, nor does a server's chain that was not verified
	// (InsecureSkipVerify).
	//
	// If TLSFor or GetClientCertificate of TLS is set, each sweep also asks them which
	// certificate would be presented now, with the request of the connection's handshake,
	// whose Context is done; TLSFor once more for each address and certificate. A
	// connection with another leaf is retired: it is closed now if it is idle, and when
	// it is given back if it is in use; the reason is ClosedRetired. An error, an answer
	// without a certificate and one that takes longer than 5 seconds change nothing.
	//
	// TLSExpiry covers the handshakes of the pool, also those over a connection that
	// Dialers has opened for TCP; a dialer of TLS does its own. A session resumed has the
	// client certificate of another handshake, and crypto/tls does not say which, so
	// where a client certificate may be presented no session is resumed. false: off, a
	// connection outlives its certificates.
	TLSExpiry bool

	// Setup runs once per connection, before its first loan, to log in or greet. nc
	// works during Setup and later whenever the connection is lent, and otherwise fails
	// with ErrReturned: a codec built over nc may live in the returned state for as
	// long as the connection. ctx ends with Setup, and before that with DialTimeout; it
	// has the values of the ctx of the borrower that made the pool dial. Give a client
	// that keeps a ctx nc.(Conn).Context(), which ends when the connection leaves the pool.
	//
	// An error closes the connection, and only that borrower gets the error. But if Setup
	// logs in with what the values of ctx say, borrowers of one address affect each other:
	// the connection may serve another borrower, and failures of one make the address back
	// off for all. A Scope for each user keeps them apart.
	//
	// If state is an io.Closer, it is closed with the connection. Before a close that is in
	// step with the peer (evicted, expired, retired, surplus, closed on request or with the
	// pool) Close runs first and may say goodbye: nc works meanwhile, its I/O fails after a
	// quarter of a second, and the socket is closed when Close returns or closes nc, after
	// 5 seconds at most. After any other end the socket is closed first, and nc fails.
	//
	// For a client that reads nc all the time, Setup returns [Resident]. For a client that
	// dials for itself, the dialer returns [Carry].
	//
	// If what Setup logged in with ends at some time, as a token does, give state a
	// method Expires() time.Time. The pool asks it once, after Setup (the zero time means
	// never), and does not lend the connection after that time, less a random part of up
	// to a tenth of the time that was left: an idle connection is closed by the next
	// sweep, one in use when it is given back. If the time is over already, the dial
	// fails.
	//
	// Setup must read all that the peer has sent, and flush what it wrote. If bytes are
	// left in its state, in crypto/tls or in the socket, the dial fails (with a Push,
	// bytes to be read go to Push before the first loan). If a peer speaks first, Setup
	// must read its greeting; without a Setup the first borrower gets the greeting.
	//
	// When the connection is given back, the state must hold no bytes that were read
	// and not used, or written and not flushed; else the pool closes the connection.
	// The pool calls a method Buffered() int of the state; if the state buffers both
	// directions, the method returns the sum of both (with a Push, only of what was
	// read). The pool also looks at each *bufio.Reader, Writer or ReadWriter in the
	// state: the state itself, its fields, exported or not, structs inside it or
	// embedded, and types of net/textproto; and it asks a *json.Decoder, in the same
	// places, for what it has read ahead. It cannot see buffers elsewhere.
	Setup func(ctx context.Context, addr Addr, nc net.Conn) (state any, err error)

	// # Keeping it clean: what is done with an open connection between two loans
	//
	// KeepErr says which errors of a protocol leave a connection in step, such as "no
	// such key": true has the effect of [Keep] around err, but forgives no time-out. It
	// is asked when fn returned an error that holds no mark of Keep, and nothing else
	// speaks against the connection: no operation failed, timed out or is still running,
	// and ctx is not done. It is not asked for an error that holds an [Error], which is
	// about another use. The borrower gets fn's error in any case. Several calls may run
	// at once. KeepErr must not block: if it takes longer than a quarter of a second,
	// panics or ends its goroutine, the pool closes the connection and reports that to
	// Logger. If fn passes on the error of a use of another connection, KeepErr is asked
	// about fn's connection; so a fn that has begun an exchange must not return such an
	// error as it is. nil: only Keep keeps a connection.
	KeepErr func(addr Addr, err error) bool

	// Reset runs when a connection is given back in good order, before the connection
	// becomes idle or goes to the next borrower, and the borrower waits for it. It is
	// there to roll back, or to restore a session's defaults. If it fails, or takes
	// longer than HookTimeout, the pool closes the connection; the borrower does not
	// get the error.
	Reset func(ctx context.Context, c Conn) error

	// Check is a ping of the protocol. It runs before a loan if the connection has been
	// idle for longer than CheckAfterIdle, and in each sweep. If it fails, or takes
	// longer than HookTimeout, the pool closes the connection, and the borrower gets
	// another.
	Check func(ctx context.Context, c Conn) error

	// CheckAfterIdle is how long after its last use (or Check) a connection is lent
	// without calling Check. 0: SweepInterval, or 20 seconds if that is off; negative:
	// Check precedes every loan of a connection that has been lent before.
	CheckAfterIdle time.Duration

	// Push gets what a peer sends while the connection is idle. If the pool finds bytes
	// on an idle connection, it does not close the connection but lends it to Push, on
	// a goroutine of its own. Push reads one message, or several; if it returns nil,
	// the connection is given back, and if bytes are left, Push is called again. The
	// pool closes the connection if Push returns an error, takes longer than
	// HookTimeout, or returns nil without having read anything. ctx is done when the
	// pool closes, or after HookTimeout; it has no values. Bytes of a borrower's last
	// read that are left in a buffer of the state count, too.
	//
	// On Linux Push is called when bytes arrive; elsewhere, and for a [Prober], when
	// the connection is about to be lent or a sweep comes. TLS session tickets alone
	// are no reason to call Push. Bytes that arrive between the probe before a loan and
	// the end of the loan are the borrower's: if peers of a protocol send without a
	// request, borrowers must handle such messages as Push does. And the pool cannot
	// tell a message from the rest of a reply that a borrower left unread: Push must
	// tell them apart, and return an error for the latter.
	Push func(ctx context.Context, c Conn) error

	// HookTimeout bounds one run of Reset, Check or Push. 0: 5 seconds;
	// negative: no bound.
	HookTimeout time.Duration

	// # Watching: what the pool reports, and to whom
	//
	// Logger gets what an operator should know: connections lost while idle, addresses
	// that fail, hooks that break their contract. nil: no log.
	Logger *slog.Logger

	// Trace observes the pool. nil: no functions are called. WithTrace observes one
	// use.
	Trace *Trace

	// HoldWarn is how long a connection may be in use, in one loan, lease or session,
	// before the pool reports it, once, with the place where it was borrowed: to
	// Trace.HeldLong, and to Logger as a warning. The loan itself goes on. It costs a
	// walk up the stack for each borrow. 0 or negative: no report.
	HoldWarn time.Duration

	// Profile gets each connection that is in use, with the stack of its borrow, for go
	// tool pprof: net/http/pprof serves a profile made with pprof.NewProfile under its
	// name. nil: none.
	Profile *pprof.Profile

	// Debug keeps the stack of each borrow, and reports the use of a Conn after its
	// loan to Logger, with both stacks. The pool also audits its books, after each
	// change and whenever Stats is called, and panics if the books contradict
	// themselves. It costs some microseconds per loan. Stats audits all books at once, and
	// borrowers wait meanwhile: the time grows with the connections and addresses.
	Debug bool

	// # Rare: what nearly every program leaves alone
	//
	// NoneRemovable is called when file handles ran out and no idle connection is left
	// to close, unless the ctx of the borrower has a function of its own
	// (WithNoneRemovable). true says that a handle was freed, and the pool dials once
	// more; with false, or if NoneRemovable is nil, the borrow fails with an error that
	// is ErrNoneRemovable.
	NoneRemovable func(*Error) bool

	// NoProbe switches off the probe before each loan and in the sweep. The pool then
	// also lends a connection that the peer closed, or on which the peer sent
	// unrequested bytes. It is meant for protocols in which every exchange begins with
	// a ping.
	NoProbe bool

	// NoFDCheck switches off the check, at each loan and before each close, that the
	// descriptor is still the socket that was dialled. It is meant for programs in
	// which no code closes descriptors that it does not own.
	NoFDCheck bool
}

const (
	defaultMaxDialing    = 64
	defaultIdleTimeout   = 2 * time.Minute
	defaultDialTimeout   = 10 * time.Second
	defaultSweepInterval = 20 * time.Second
	defaultHookTimeout   = 5 * time.Second
)

// century is the longest duration that a Config keeps. A longer one, meant as "for
// ever", would overflow as soon as something is added to it.
const century = 100 * 365 * 24 * time.Hour

// configError is the error of New for a Config that cannot be used.
type configError struct{ err error }

func (e *configError) Error() string   { return e.err.Error() }
func (e *configError) Unwrap() []error { return []error{e.err, fs.ErrInvalid} }

// shortest is the shortest positive duration that New accepts. A shorter one is most
// likely a number without a unit: 30 is 30 nanoseconds.
const shortest = time.Millisecond

// meant returns an error for a value in cfg that the pool could use, but that the
// caller cannot have meant.
func (cfg *Config) meant() error {
	for _, d := range [...]struct {
		name string
		is   time.Duration
	}{
		{"IdleTimeout", cfg.IdleTimeout},
		{"MaxLifetime", cfg.MaxLifetime},
		{"DialTimeout", cfg.DialTimeout},
		{"WaitTimeout", cfg.WaitTimeout},
		{"MaxBackoff", cfg.MaxBackoff},
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

// takesEntries reports whether entries can be added to a profile. If not, package pprof
// panics.
func takesEntries(to *pprof.Profile) (yes bool) {
	defer func() { yes = recover() == nil }()
	entry := new(byte)
	to.Add(entry, 0)
	to.Remove(entry)
	return true
}

// resolved returns cfg with every default filled in: a limit that is off is
// math.MaxInt, a duration that is off is 0, and none is longer than a century. MaxOpen
// keeps its 0, which stands for the limit that follows from the limit on file handles;
// MaxBackoff keeps its 0, which stands for two defaults, and a negative value.
func (cfg Config) resolved() (Config, error) {
	senseless := func(a, b, why string) (Config, error) {
		return Config{}, fmt.Errorf("connpool: Config.%s and Config.%s contradict each other: %s", a, b, why)
	}
	switch {
	case cfg.WhenFull > FullOverflow:
		return Config{}, fmt.Errorf("connpool: Config.WhenFull is %d: use FullWait, FullFail or FullOverflow", cfg.WhenFull)
	case cfg.Push != nil && cfg.NoProbe:
		return senseless("Push", "NoProbe", "without a look nobody sees what there is to push")
	case cfg.FollowDNS && cfg.SweepInterval < 0:
		return senseless("FollowDNS", "SweepInterval", "names are looked up in the sweep")
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
	span(&cfg.WaitTimeout, 0)
	cfg.MaxBackoff = min(cfg.MaxBackoff, century)
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
	if cfg.Dialer != nil {
		base := *cfg.Dialer
		cfg.Dialer = &base
	}
	if cfg.TLS != nil {
		cfg.TLS = cfg.TLS.Clone()
	}
	return cfg, nil
}

// canonical is the canonical form of addr. It is an error if no dialer dials addr.
func (cfg *Config) canonical(addr Addr) (Addr, error) {
	addr, err := addr.canonical()
	if err != nil {
		return addr, err
	}
	switch addr.Transport {
	case TCP, TLS, Unix:
	default:
		if cfg.Dialers[addr.Transport] == nil {
			return addr, fmt.Errorf("no dialer for transport %q: set Config.Dialers[%q]", addr.Transport, addr.Transport)
		}
	}
	return addr, nil
}

// isForPush reports whether Push gets a connection that would be closed for this reason.
func (cfg *Config) isForPush(reason CloseReason) bool {
	return reason == ClosedDirty && cfg.Push != nil
}

// isLocalhost reports whether name is localhost: the one name that a tls.Config may
// give to many addresses at once, those of the loopback interface.
func isLocalhost(name string) bool {
	return strings.EqualFold(strings.TrimSuffix(name, "."), "localhost")
}
