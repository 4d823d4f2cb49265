package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/gateway"
)

const gatewayTeaching = `usage: connpool gateway -listen ADDR -to ADDR -framing NAME [flags]

Many clients, few connections. The gateway stands between clients and one
server. Clients connect to it, unchanged, as they would to the server. The
gateway carries out each request over a connection borrowed from a pool for as
long as the request takes. A silent client holds no connection.

ADDR is tcp://host:port, tls://host:port or unix:/path, on either side.

NAME says how the protocol marks the end of a message:

  line     a line feed ends it; one line is the answer to one line
  length   a field of 1, 2 or 4 bytes gives the length (see -length-...)
  resp     Redis and compatible servers. Pipelines stay pipelines. Clients share
           connections only with clients that sent the same AUTH, HELLO, SELECT
           and CLIENT SETNAME. After MULTI, WATCH, SUBSCRIBE, MONITOR, a blocking
           command or another that leaves state on its connection, a client has
           a connection of its own
  modbus   Modbus/TCP; transaction ids are replaced on the way and put back
  session  anything: each client has a connection of its own, from its first
           byte to its end

A request that got no answer is never sent again, since the server may have
carried it out. The client gets an error reply of the protocol (resp: -ERR,
modbus: exception 0x0A, 0x0B or 0x06), the -error-reply, or the end of its
connection.

Without TLS the gateway listens on loopback and Unix sockets only. Ctrl-C or
SIGTERM ends it: it stops listening, also on -status, waits for the requests
under way, for -drain at most, and closes. A second signal ends it at once.
SIGHUP reads the certificates again, as a change of their files does, and
replaces all connections to the server.

flags:
`

const gatewayExamples = `
examples:
  # 1,000 clients on 8 connections of a Redis server
  connpool gateway -framing resp -listen tcp://127.0.0.1:6380 -to tcp://127.0.0.1:6379 -max-open 8

  # programs without TLS reach a server that demands it
  connpool gateway -framing resp -listen unix:/run/redis-gw.sock -to tls://redis.example:6380 -ca ca.pem

  # a device that takes one connection, for everybody
  connpool gateway -framing modbus -listen tcp://127.0.0.1:1502 -to tcp://192.0.2.7:502 -max-open 1

  # a protocol of your own: 4 bytes of length, big endian, then as many bytes
  connpool gateway -framing length -length-bytes 4 -listen tcp://127.0.0.1:7001 -to tcp://127.0.0.1:7000

  # are the flags and certificates good, and is the server there?
  connpool gateway -check -reach -framing line -listen tls://0.0.0.0:7001 -cert c.pem -key k.pem -to tcp://127.0.0.1:7000

  # numbers for a monitoring system
  connpool gateway ... -status tcp://127.0.0.1:9100   and   curl http://127.0.0.1:9100/metrics
`

// gatewayOptions holds the settings from the command line.
type gatewayOptions struct {
	gateway.Config
	check, reach, quiet, verbose bool
}

// byteSize is a flag such as 64KiB, 16MiB or a plain number.
type byteSize struct{ n *int64 }

var byteUnits = []struct {
	name string
	size int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}, {"", 1}}

func (b byteSize) String() string {
	if b.n == nil {
		return ""
	}
	for _, u := range byteUnits {
		if *b.n != 0 && *b.n%u.size == 0 {
			return strconv.FormatInt(*b.n/u.size, 10) + u.name
		}
	}
	return "0"
}

func (b byteSize) Set(s string) error {
	for _, u := range byteUnits {
		if digits, ok := strings.CutSuffix(s, u.name); ok {
			n, err := strconv.ParseInt(digits, 10, 64)
			if err != nil || n < 0 || n > math.MaxInt64/u.size {
				break
			}
			*b.n = n * u.size
			return nil
		}
	}
	return errors.New("use a size such as 64KiB, 16MiB, 1GiB or a number of bytes")
}

// octal is a flag of permission bits.
type octal struct{ m *fs.FileMode }

func (o octal) String() string {
	if o.m == nil {
		return ""
	}
	return fmt.Sprintf("%04o", uint32(*o.m))
}

func (o octal) Set(s string) error {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil {
		return errors.New("use octal digits, such as 0660")
	}
	*o.m = fs.FileMode(n)
	return nil
}

// parseGateway reads the flags. It returns flag.ErrHelp after it printed the usage on
// stdout, and any other error without printing anything.
func parseGateway(args []string, stdout io.Writer) (gatewayOptions, error) {
	var o gatewayOptions
	maxFrame := int64(16 << 20)
	o.MaxMemory, o.SocketMode = 512<<20, 0o600
	var endian, errorReply string
	fs := flag.NewFlagSet("connpool gateway", flag.ContinueOnError)
	fs.StringVar(&o.Listen, "listen", "", "where clients connect: an `address`; port 0 is any free port")
	fs.StringVar(&o.To, "to", "", "the server: an `address`")
	fs.StringVar(&o.Framing, "framing", "", "line, length, resp, modbus or session: a `name` from above")
	fs.StringVar(&o.StatusListen, "status", "", "serve /metrics and /status.json at this `address`: a Unix socket, or TCP on loopback")
	fs.Var(octal{&o.SocketMode}, "socket-mode", "`permissions` of the Unix sockets it listens on")
	fs.BoolVar(&o.InsecureListen, "insecure-listen", false, "one of two flags that together allow listening beyond loopback without TLS")
	fs.BoolVar(&o.AnyoneCanConnect, "i-know-that-anyone-can-connect", false, "the other of the two flags that allow listening beyond loopback without TLS")

	fs.StringVar(&o.Server.Cert, "cert", "", "PEM `file` with the gateway's certificate, for -listen tls://")
	fs.StringVar(&o.Server.Key, "key", "", "PEM `file` with the key of -cert")
	fs.StringVar(&o.Server.ClientCA, "client-ca", "", "PEM `file`: clients must have a certificate issued by one of these authorities")
	fs.StringVar(&o.Upstream.CA, "ca", "", "PEM `file`: the server's certificate must be issued by one of these authorities; without this flag, by one that the system trusts")
	fs.StringVar(&o.Upstream.ServerName, "server-name", "", "the `name` in the server's certificate, if it is not the host of -to")
	fs.StringVar(&o.Upstream.Cert, "upstream-cert", "", "PEM `file` with the certificate that the gateway shows to the server")
	fs.StringVar(&o.Upstream.Key, "upstream-key", "", "PEM `file` with the key of -upstream-cert")
	fs.DurationVar(&o.ReloadEvery, "reload-every", 5*time.Second, "how often to check whether the certificate files changed; negative: on SIGHUP only")

	fs.StringVar(&o.ALPN, "alpn", "", "TLS: the `name` of the protocol, or several with commas, that is offered to the server and accepted from clients, such as postgresql")

	fs.IntVar(&o.Length.Size, "length-bytes", 4, "length: `bytes` of the field, 1, 2 or 4")
	fs.IntVar(&o.Length.Offset, "length-offset", 0, "length: `bytes` before the field")
	fs.StringVar(&endian, "length-endian", "big", "length: `order` of the field's bytes, big or little")
	fs.BoolVar(&o.Length.WithHead, "length-includes-header", false, "length: the field counts itself and the bytes before it as well, not only the bytes after it")
	fs.StringVar(&errorReply, "error-reply", "", `line, length: the `+"`reply`"+` to a request that the server did not answer, with escapes as in Go: 'ERR\n', '\x00\x00\x00\x03ERR'`)
	fs.BoolVar(&o.Eager, "eager", false, "session: connect to the server at once, not at the client's first byte; for protocols where the server speaks first")

	fs.IntVar(&o.MaxClients, "max-clients", 10_000, "`number` of clients; if not given, fewer if the limit of open files has no room for so many; one more is closed at once")
	fs.IntVar(&o.MaxOpen, "max-open", 16, "`number` of connections to the server")
	fs.IntVar(&o.MaxPinned, "max-pinned", 0, "resp: `number` of connections to the server that single clients may have to themselves; 0: half of -max-open")
	fs.IntVar(&o.MaxUses, "max-uses", 0, "`number` of times a connection is used; 0: no limit; 1 for a server that is not trusted")
	fs.Var(byteSize{&maxFrame}, "max-frame", "`size` of a request, and of a reply")
	fs.Var(byteSize{&o.MaxMemory}, "max-memory", "`size` of the data stored for all clients together")
	fs.IntVar(&o.Pipeline, "pipeline", 0, "`number` of requests of one client that are sent ahead of their replies; 0: 32, and 1 for modbus")

	fs.DurationVar(&o.IdleTimeout, "idle-timeout", time.Hour, "close a client that is silent for this long; negative: never")
	fs.DurationVar(&o.HoldTimeout, "hold-timeout", time.Minute, "resp: close a client that is silent for this long in the middle of a transaction, when it holds a connection")
	fs.DurationVar(&o.RequestTimeout, "request-timeout", 30*time.Second, "from a request to its reply, including the wait for a connection")
	fs.DurationVar(&o.WriteTimeout, "write-timeout", 10*time.Second, "close a client that does not read its replies for this long")
	fs.DurationVar(&o.DialTimeout, "dial-timeout", 10*time.Second, "time for opening a connection to the server")
	fs.DurationVar(&o.MaxLifetime, "max-lifetime", 30*time.Minute, "age at which a connection to the server is replaced, between two requests; negative: none")
	fs.DurationVar(&o.GreetingWait, "greeting-wait", 1100*time.Millisecond, "how late a server may speak first and still be noticed: the very first reply is held until its connection is this old; negative: do not listen")
	fs.BoolVar(&o.BroadcastSilent, "broadcast-silent", false, "modbus: send the client of a broadcast nothing; without this flag it gets the normal response once the broadcast is over")
	fs.DurationVar(&o.BroadcastWait, "broadcast-wait", 200*time.Millisecond, "modbus: how long a broadcast (unit 0, or function 8/4) occupies the connection, if no reply comes")
	fs.DurationVar(&o.ConnectDelay, "connect-delay", 0, "between the opening of a connection and its first request, for devices that are not ready at once")
	fs.DurationVar(&o.RedialDelay, "redial-delay", 0, "between the end of a connection and the opening of the next, for devices that accept one at a time")
	fs.DurationVar(&o.Drain, "drain", 30*time.Second, "time for the requests under way when the gateway is asked to end; negative: do not wait")

	fs.BoolVar(&o.check, "check", false, "check the flags and certificates, print what would be done, and exit: status 0 if all is good, else 2")
	fs.BoolVar(&o.reach, "reach", false, "with -check: also find out whether the server would answer a request")
	fs.BoolVar(&o.quiet, "quiet", false, "log errors only")
	fs.BoolVar(&o.verbose, "verbose", false, "also log why single clients were closed and single requests failed")

	if err := parseTeaching(fs, args, stdout, gatewayTeaching, gatewayExamples); err != nil {
		return o, err
	}
	var others []string // flags of another framing
	clients := o.MaxClients
	o.MaxClients = 0 // not set: as many as the limit of open files allows
	fs.Visit(func(f *flag.Flag) {
		if f.Name == "max-clients" {
			if o.MaxClients = clients; clients == 0 {
				o.MaxClients = -1 // refused below
			}
		}
		if strings.HasPrefix(f.Name, "length-") && o.Framing != "length" {
			others = append(others, "-"+f.Name)
		}
		if f.Name == "hold-timeout" || f.Name == "max-pinned" {
			if o.Framing != "resp" {
				others = append(others, "-"+f.Name)
			}
		}
		if strings.HasPrefix(f.Name, "broadcast-") && o.Framing != "modbus" || f.Name == "greeting-wait" && o.Framing == "session" {
			others = append(others, "-"+f.Name)
		}
	})
	if len(others) > 0 {
		return o, fmt.Errorf("%s: not for the framing %q", strings.Join(others, ", "), o.Framing)
	}
	switch endian {
	case "big", "little":
		o.Length.Little = endian == "little"
	default:
		return o, fmt.Errorf("-length-endian is %q: use big or little", endian)
	}
	var err error
	if o.ErrorReply, err = strconv.Unquote(`"` + strings.ReplaceAll(errorReply, `"`, `\"`) + `"`); err != nil {
		return o, fmt.Errorf(`-error-reply is %q: use escapes as in Go, such as 'ERR\n'`, errorReply)
	}
	if o.MaxFrame = int(maxFrame); maxFrame < 1 || maxFrame > math.MaxInt32 {
		return o, fmt.Errorf("-max-frame is %v: use up to 1GiB", byteSize{&maxFrame})
	}
	if o.reach && !o.check {
		return o, errors.New("-reach goes with -check")
	}
	return o, nil
}

// gatewayCommand is the command.
func gatewayCommand(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parseGateway(args, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return exitOK
	}
	level := slog.LevelInfo
	switch {
	case o.quiet:
		level = slog.LevelError
	case o.verbose:
		level = slog.LevelDebug
	}
	o.Logger = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	ignoreBrokenPipes()
	// The gateway's own output must not block it: a reader of its log or of its report
	// may be slow, stopped or gone.
	told, logged := &teller{w: stdout}, &teller{w: stderr}
	defer told.flush(ctx, o.check)
	defer logged.flush(ctx, o.check)
	stdout, stderr = told, logged
	// First, because the signal would otherwise end a process that waits for a file, or
	// leave behind the socket file of one that has just begun to listen.
	reload, stopReload := reloadSignal()
	defer stopReload()
	var g *gateway.Gateway
	if err == nil {
		err = within(ctx, func() (err error) { g, err = gateway.NewContext(ctx, o.Config); return err })
	}
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			fmt.Fprintf(stderr, "connpool gateway: %s\n", strings.TrimRight(line, "\n"))
		}
		fmt.Fprintln(stderr, "connpool gateway -h explains the flags.")
		return exitUsage
	}
	if o.check {
		return checkGateway(ctx, o, g, stdout, stderr)
	}
	if err := within(ctx, func() error { return g.ListenContext(ctx) }); err != nil {
		if !errors.Is(err, errNotWaited) {
			g.Close()
		}
		fmt.Fprintf(stderr, "connpool gateway: %v\n", err)
		return exitBroken
	}
	// A second signal ends the drain, and not the process, which still has files to
	// remove.
	again := make(chan os.Signal, 2)
	signal.Notify(again, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(again)
	hurry, hasten := context.WithCancel(context.Background())
	defer hasten()
	served := make(chan struct{})
	go func() {
		signals := 0
		for {
			select {
			case <-reload:
				go g.Renew() // Renew logs its outcome, and may wait for a file
			case <-again: // the first signal is the one that ends ctx
				if signals++; signals == 2 {
					g.Logger.Info("told to hurry")
					hasten()
				}
			case <-served:
				return
			}
		}
	}()
	g.Logger.Info("listening", "at", g.Status().Listen, "to", o.To, "framing", o.Framing, "status", statusPlace(g), "clients", g.MaxClientsNow())
	limited, unlimit := context.WithCancel(context.Background())
	go g.LimitMemory(limited)
	err = g.Serve(ctx, hurry)
	unlimit()
	close(served)
	st := g.Status()
	if !o.quiet {
		fmt.Fprintf(stdout, "connpool gateway: %d clients, %d requests, %d replies; %d connections opened, %d at once; up %s\n",
			st.Accepted, st.Requests, st.Replies, st.Pool.Dials-st.Pool.DialErrors, st.Pool.PeakOpen,
			time.Duration(st.Uptime*float64(time.Second)).Round(time.Millisecond))
	}
	if err != nil {
		fmt.Fprintf(stderr, "connpool gateway: %v\n", err)
		return exitBroken
	}
	return exitOK
}

func statusPlace(g *gateway.Gateway) string {
	if a := g.StatusAddr(); a != nil {
		return a.Network() + ":" + a.String()
	}
	return "none"
}

// checkGateway prints what would be done, and whether that is possible.
func checkGateway(ctx context.Context, o gatewayOptions, g *gateway.Gateway, stdout, stderr io.Writer) int {
	defer g.Close()
	if o.reach {
		remark, err := g.Examine(ctx)
		if err != nil {
			fmt.Fprintf(stderr, "connpool gateway: the server is not reached: %v\n", err)
			return exitUsage
		}
		if remark != "" {
			fmt.Fprintf(stderr, "connpool gateway: %s\n", remark)
		}
	}
	st := g.Status()
	fmt.Fprintf(stdout, "connpool gateway: as the flags say: %s, from %s to %s, at most %d clients on %d connections%s\n",
		st.Framing, st.Listen, st.To, g.MaxClientsNow(), o.MaxOpen, map[bool]string{true: "; the server was reached"}[o.reach])
	shares, lacks := g.Descriptors()
	fmt.Fprintf(stdout, "  file descriptors: %s\n", shares)
	if lacks != "" {
		fmt.Fprintf(stderr, "connpool gateway: %s\n", lacks)
	}
	lines, invalid := g.Certificates()
	when := "yet"
	for _, line := range lines {
		fmt.Fprintf(stdout, "  %s\n", line)
		if strings.Contains(line, "EXPIRED") {
			when = "any more"
		}
	}
	if invalid {
		fmt.Fprintf(stderr, "connpool gateway: a certificate is not valid %s: replace its file\n", when)
		return exitUsage
	}
	return exitOK
}
