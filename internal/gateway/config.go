package gateway

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// Config shapes a gateway. Each field is a flag of the command; error messages name the
// flag. For numbers and durations 0 is the default given here.
type Config struct {
	Listen  string // tcp://host:port, tls://host:port or unix:/path
	To      string // the server, in the form of connpool.ParseAddr
	Framing string // line, length, resp, modbus or session

	// StatusListen is where /metrics and /status.json are served: a Unix socket or a
	// loopback address. "" serves them nowhere.
	StatusListen string

	// SocketMode is the mode of the Unix sockets that the gateway listens on. 0: 0600.
	SocketMode fs.FileMode

	// InsecureListen and AnyoneCanConnect together allow listening beyond loopback
	// without TLS.
	InsecureListen, AnyoneCanConnect bool

	Server   ServerFiles   // of a tls listener
	Upstream UpstreamFiles // of a tls server

	// ReloadEvery is how often the certificate files are checked for changes. 0: 5 s;
	// negative: only Reload checks.
	ReloadEvery time.Duration

	// ALPN is the list of protocol names, separated by commas, that the gateway offers to
	// the server and accepts from clients in TLS. "": none.
	ALPN string

	Length LengthField // for the framing length

	// ErrorReply is what a client of line or length gets instead of a reply that did not
	// come. "": the client is closed.
	ErrorReply string

	// Eager opens a session's connection when the client connects, and not at its first
	// byte, for protocols in which the server speaks first.
	Eager bool

	// MaxClients is the limit of connected clients, lowered to what the limit of open
	// files has room for. 0: 10000.
	MaxClients int

	MaxOpen   int   // connections to the server. 0: 16
	MaxPinned int   // how many of them single clients may have to themselves (resp). 0: half of MaxOpen, 1 at least
	MaxUses   int   // exchanges per connection to the server. 0: no limit
	MaxFrame  int   // bytes of a request or a reply. 0: 16 MiB
	MaxMemory int64 // bytes held for all clients together. 0: 512 MiB
	Pipeline  int   // requests of one client that are sent before their replies arrive. 0: 32, and 1 for modbus

	IdleTimeout     time.Duration // of a silent client. 0: 1 hour; negative: none
	HoldTimeout     time.Duration // of a client that is silent in the middle of a transaction (resp). 0: 1 minute
	RequestTimeout  time.Duration // from a request to its reply, including the wait for a connection. 0: 30 s
	WriteTimeout    time.Duration // for a client to take its replies. 0: 10 s
	DialTimeout     time.Duration // 0: 10 s
	MaxLifetime     time.Duration // age of a connection to the server. 0: 30 min; negative: no limit
	GreetingWait    time.Duration // how long the gateway waits for a server it does not know yet to speak first, see greetings. 0: 1.1 s; negative: no wait
	BroadcastSilent bool          // the client gets no reply to a broadcast that no device has answered (modbus)
	BroadcastWait   time.Duration // how long to wait for a reply to a request that has none by the specification (modbus). 0: 200 ms
	ConnectDelay    time.Duration // from the opening of a connection to its first request. 0 or negative: none
	RedialDelay     time.Duration // from the end of a connection to the opening of the next one. 0 or negative: none
	Drain           time.Duration // how long requests under way may take after the gateway was asked to end. 0: 30 s; negative: none

	Logger *slog.Logger // nil: no log
}

// framing is what the gateway knows about a protocol.
type framing struct {
	name        string
	newRequests func(*Config) scanner
	newReplies  func(*Config) scanner
	serve       func(*client)     // runs until the client is closed
	full        string            // sent to a client above MaxClients
	demotes     func([]byte) bool // reports whether a reply says that another server must be asked; nil: none does

	// refuse appends the error reply for a request that the server did not answer. It is
	// nil if the protocol has no error reply.
	refuse func(cfg *Config, dst, request []byte, why failure) []byte
}

var framings map[string]*framing

func init() {
	framings = map[string]*framing{
		"line": {
			name:        "line",
			newRequests: func(*Config) scanner { return lineScanner{} },
			newReplies:  func(*Config) scanner { return lineScanner{} },
			serve:       (*client).serveExchanges,
			refuse:      refuseByFlag,
		},
		"length": {
			name:        "length",
			newRequests: func(cfg *Config) scanner { return &lengthScanner{field: cfg.Length, max: cfg.MaxFrame} },
			newReplies:  func(cfg *Config) scanner { return &lengthScanner{field: cfg.Length, max: cfg.MaxFrame} },
			serve:       (*client).serveExchanges,
			refuse:      refuseByFlag,
		},
		"modbus": {
			name:        "modbus",
			newRequests: func(*Config) scanner { return newMBAPScanner() },
			newReplies:  func(*Config) scanner { return newMBAPScanner() },
			serve:       (*client).serveExchanges,
			refuse:      modbusException,
		},
		"resp": {
			name:        "resp",
			newRequests: func(cfg *Config) scanner { return &respRequests{max: cfg.MaxFrame} },
			newReplies:  func(cfg *Config) scanner { return &respReplies{max: cfg.MaxFrame} },
			serve:       (*client).serveRESP,
			refuse:      respFailure,
			demotes:     isDemotion,
			full:        "-ERR max number of clients reached\r\n",
		},
		"session": {name: "session", serve: (*client).serveSession},
	}
}

const framingNames = "line, length, resp, modbus or session"

func refuseByFlag(cfg *Config, dst, _ []byte, _ failure) []byte {
	if cfg.ErrorReply == "" {
		return nil
	}
	return append(dst, cfg.ErrorReply...)
}

// plan is a valid Config with every default filled in.
type plan struct {
	Config
	listen  endpoint
	status  endpoint
	to      connpool.Addr
	framing *framing
	alpn    []string

	wantClients int // the number asked for explicitly; 0: as many as possible
	askClients  int // the same, or the default
}

func (cfg Config) plan() (*plan, error) {
	p := &plan{Config: cfg}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	number := func(flag string, n *int, zero, least int) {
		if *n == 0 {
			*n = zero
		}
		if *n < least {
			bad("-%s is %d: use %d or more", flag, *n, least)
		}
	}
	p.wantClients = p.MaxClients
	number("max-clients", &p.MaxClients, defaultMaxClients, 1)
	number("max-open", &p.MaxOpen, 16, 1)
	number("max-pinned", &p.MaxPinned, max(1, p.MaxOpen/2), 1)
	if p.MaxPinned > p.MaxOpen {
		bad("-max-pinned is %d: no more than -max-open, which is %d, can ever be open", p.MaxPinned, p.MaxOpen)
	}
	number("max-uses", &p.MaxUses, 0, 0)
	number("max-frame", &p.MaxFrame, 16<<20, 16)
	if p.MaxFrame > 1<<30 {
		bad("-max-frame is %d: 1GiB is the most", p.MaxFrame)
	}
	if p.Framing == "modbus" && p.Pipeline == 0 {
		p.Pipeline = 1
	}
	number("pipeline", &p.Pipeline, 32, 1)
	if p.Framing == "modbus" && p.Pipeline > 1 {
		bad("-pipeline is %d: modbus servers answer one request at a time, leave it out", p.Pipeline)
	}
	if p.MaxMemory == 0 {
		p.MaxMemory = 512 << 20
	}
	if p.MaxMemory < 1<<20 {
		bad("-max-memory is %d: use 1MiB or more", p.MaxMemory)
	}
	span := func(flag string, d *time.Duration, zero time.Duration, mayBeOff bool) {
		switch {
		case *d == 0:
			*d = zero
		case *d < 0 && !mayBeOff:
			bad("-%s is %v: it must be positive", flag, *d)
		}
	}
	span("idle-timeout", &p.IdleTimeout, time.Hour, true)
	span("hold-timeout", &p.HoldTimeout, time.Minute, false)
	span("request-timeout", &p.RequestTimeout, 30*time.Second, false)
	span("write-timeout", &p.WriteTimeout, 10*time.Second, false)
	span("dial-timeout", &p.DialTimeout, 10*time.Second, false)
	span("max-lifetime", &p.MaxLifetime, 30*time.Minute, true)
	span("greeting-wait", &p.GreetingWait, 1100*time.Millisecond, true)
	span("broadcast-wait", &p.BroadcastWait, 200*time.Millisecond, false)
	span("drain", &p.Drain, 30*time.Second, true)
	span("reload-every", &p.ReloadEvery, 5*time.Second, true)
	if p.SocketMode == 0 {
		p.SocketMode = 0o600
	}
	if p.SocketMode&^0o777 != 0 {
		bad("-socket-mode is %o: use the nine bits of rwxrwxrwx, such as 0660", p.SocketMode)
	}
	if p.Logger == nil {
		p.Logger = slog.New(slog.DiscardHandler)
	}

	if p.framing = framings[p.Framing]; p.framing == nil {
		if p.Framing == "" {
			bad("-framing is missing: it says how the protocol marks the end of a message; use %s", framingNames)
		} else {
			bad("-framing is %q: use %s", p.Framing, framingNames)
		}
	}
	if p.Framing == "length" {
		if err := p.Length.validate(); err != nil {
			errs = append(errs, err)
		}
	}
	if p.ErrorReply != "" && p.Framing != "line" && p.Framing != "length" {
		bad("-error-reply is for the framings line and length; %s has errors of its own, or none", p.Framing)
	}
	if p.Framing == "line" && p.ErrorReply != "" && (strings.Count(p.ErrorReply, "\n") != 1 || !strings.HasSuffix(p.ErrorReply, "\n")) {
		bad(`-error-reply is %q: it must be one line, with its \n at the end`, p.ErrorReply)
	}
	if p.Framing == "length" && p.ErrorReply != "" && p.Length.validate() == nil {
		sc := &lengthScanner{field: p.Length, max: p.MaxFrame}
		if n, done, err := sc.scan([]byte(p.ErrorReply)); !done || err != nil || n != len(p.ErrorReply) {
			bad("-error-reply is %q: it must be one whole frame, with its length", p.ErrorReply)
		}
	}
	if p.Eager && p.Framing != "session" {
		bad("-eager is for the framing session; with %s a client that says nothing holds no connection", p.Framing)
	}

	var err error
	if p.listen, err = parseEndpoint(p.Listen); err != nil {
		bad("-listen: %w", err)
	} else if err := p.listen.mayServe(&p.Config); err != nil {
		errs = append(errs, err)
	}
	if p.StatusListen != "" {
		if p.status, err = parseEndpoint(p.StatusListen); err != nil {
			bad("-status: %w", err)
		} else if p.status.tls || !p.status.isLocal() {
			bad("-status is %s: use unix:/path or tcp:// on loopback; it shows addresses and counts to anyone who asks", p.StatusListen)
		}
	}
	errs = append(errs, p.Server.fits(p.listen.tls)...)
	p.to, err = connpool.ParseAddr(p.To)
	switch {
	case p.To == "":
		bad("-to is missing: it is the server, such as tcp://127.0.0.1:6379, tls://db.example:6380 or unix:/run/redis.sock")
	case err != nil:
		bad("-to: %w", err)
	case p.to.Transport != connpool.TCP && p.to.Transport != connpool.TLS && p.to.Transport != connpool.Unix:
		bad("-to is %s: the gateway reaches tcp, tls and unix", p.To)
	case p.to.Scope != "":
		bad("-to is %s: leave the scope out, the gateway gives scopes itself", p.To)
	default:
		errs = append(errs, p.Upstream.fits(&p.to)...)
	}
	if p.alpn, err = parseALPN(p.ALPN); err != nil {
		errs = append(errs, err)
	} else if len(p.alpn) > 0 && !p.listen.tls && p.to.Transport != connpool.TLS {
		bad("-alpn is for TLS, and neither -listen nor -to begins with tls://")
	}
	if len(errs) == 0 {
		errs = append(errs, p.fit())
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return p, nil
}

// parseALPN reads the names of protocols.
func parseALPN(s string) (names []string, err error) {
	if s == "" {
		return nil, nil
	}
	for name := range strings.SplitSeq(s, ",") {
		if name == "" || len(name) > 255 {
			return nil, fmt.Errorf("-alpn is %q: use names of 1 to 255 bytes, separated by commas, such as postgresql", s)
		}
		names = append(names, name)
	}
	return names, nil
}
