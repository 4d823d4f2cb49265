package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// target is a peer of the user's, and the probe that it is asked.
type target struct {
	addr    connpool.Addr
	probe   probe
	tls     *tls.Config
	timeout time.Duration // of a dial with its log-in, and of each exchange

	// open opens a socket instead of package net, if it is not nil.
	open connpool.DialFunc
}

// targetFlags are the flags that every command which measures a peer has.
type targetFlags struct {
	to, probe, ca string
	trustAnyone   bool
	timeout       time.Duration
}

func (f *targetFlags) register(fs *flag.FlagSet) {
	fs.StringVar(&f.to, "to", "", "`address` of the peer: tcp://host:port, tls://host:port or unix:/path, with the options of connpool.Addr")
	fs.StringVar(&f.probe, "probe", "line", "what to `ask` it, see below")
	fs.StringVar(&f.ca, "tls-ca", "", "`file` with the certificates (PEM) that are trusted instead of the system's")
	fs.BoolVar(&f.trustAnyone, "tls-insecure-trust-anyone", false, "do not verify the peer's certificate: any peer is trusted, and gets the passwords")
	fs.DurationVar(&f.timeout, "timeout", 10*time.Second, "`time` after which a dial or an exchange counts as failed")
}

func (f *targetFlags) target() (*target, error) {
	t := &target{timeout: f.timeout}
	var err error
	if t.addr, err = connpool.ParseAddr(f.to); err != nil {
		return nil, fmt.Errorf("-to: %w", err)
	}
	switch t.addr.Transport {
	case connpool.TCP, connpool.TLS, connpool.Unix:
	default:
		return nil, fmt.Errorf("-to %s: the transport must be tcp, tls or unix", f.to)
	}
	if t.probe, err = parseProbe(f.probe); err != nil {
		return nil, err
	}
	if f.timeout <= 0 {
		return nil, fmt.Errorf("-timeout is %v: it must be positive", f.timeout)
	}
	if t.addr.Transport != connpool.TLS {
		if f.ca != "" || f.trustAnyone {
			return nil, fmt.Errorf("-tls-ca and -tls-insecure-trust-anyone need a tls:// address, and -to is %s", f.to)
		}
		return t, nil
	}
	t.tls = &tls.Config{InsecureSkipVerify: f.trustAnyone}
	if t.probe.alpn != "" {
		t.tls.NextProtos = []string{t.probe.alpn}
	}
	if f.ca != "" {
		if f.trustAnyone {
			return nil, errors.New("-tls-ca and -tls-insecure-trust-anyone contradict each other: drop the latter")
		}
		pem, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, fmt.Errorf("-tls-ca: %w", err)
		}
		t.tls.RootCAs = x509.NewCertPool()
		if !t.tls.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("-tls-ca %s: no certificate in it; it must be PEM", f.ca)
		}
	}
	return t, nil
}

// flags returns the flags that name the same peer again.
func (f *targetFlags) flags() string {
	s := "-to " + quoted(f.to) + " -probe " + quoted(f.probe)
	if f.ca != "" {
		s += " -tls-ca " + quoted(f.ca)
	}
	if f.trustAnyone {
		s += " -tls-insecure-trust-anyone"
	}
	return s
}

// poolConfig returns the Config of a pool for this peer.
func (t *target) poolConfig() connpool.Config {
	cfg := connpool.Config{
		TLS:         t.tls,
		DialTimeout: t.timeout,
		Setup: func(ctx context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
			return t.probe.begin(ctx, addr, nc)
		},
	}
	if t.open != nil {
		cfg.Dialers = map[connpool.Transport]connpool.DialFunc{t.addr.Transport: t.open}
	}
	return cfg
}

// own is a connection without a pool.
type own struct {
	session
	nc       net.Conn
	deadline time.Time // the deadline that is set
}

// dial opens a connection by hand, the way the pool does: the same options, the same
// handshake with resumed sessions, the same log-in.
func (t *target) dial(ctx context.Context, sessions tls.ClientSessionCache) (*own, error) {
	ctx, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	nc, err := t.connect(ctx, sessions)
	if err != nil {
		return nil, err
	}
	// A probe's log-in has no ctx; the deadline makes it fail in time.
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	s, err := t.probe.begin(ctx, t.addr, nc)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		nc.Close()
		if ctx.Err() != nil {
			err = errors.Join(err, ctx.Err())
		}
		return nil, err
	}
	return &own{session: s, nc: nc}, nil
}

func (t *target) connect(ctx context.Context, sessions tls.ClientSessionCache) (net.Conn, error) {
	if t.open != nil {
		return t.open(ctx, t.addr)
	}
	a := t.addr
	options := sock.Options(a.QoS)
	if a.Transport == connpool.Unix {
		return options.Dial(ctx, "unix", a.Host)
	}
	nc, err := options.Dial(ctx, "tcp", net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))))
	if err != nil {
		return nil, err
	}
	if a.Transport == connpool.TCP {
		return nc, nil
	}
	cfg := t.tls.Clone()
	cfg.ClientSessionCache = sessions
	if cfg.ServerName = a.ServerName; cfg.ServerName == "" {
		cfg.ServerName, _, _ = strings.Cut(a.Host, "%") // no certificate contains a zone
	}
	tc := tls.Client(nc, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, err
	}
	return tc, nil
}

// ask makes one exchange that fails after timeout. It moves the deadline only when half
// of it has passed, so that most exchanges need no system call for it.
func (o *own) ask(timeout time.Duration) (more bool, err error) {
	if now := time.Now(); o.deadline.Sub(now) < timeout/2 {
		o.deadline = now.Add(timeout)
		if err := o.nc.SetDeadline(o.deadline); err != nil {
			return false, err
		}
	}
	return o.exchange()
}

// quoted returns an argument quoted for a shell.
func quoted(s string) string {
	for _, r := range s {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		case r == '-' || r == '_' || r == '.' || r == '/' || r == ':' || r == ',' || r == '=' || r == '@' || r == '%' || r == '[' || r == ']' || r == '+':
		default:
			out := "'"
			for _, r := range s {
				if r == '\'' {
					out += `'\''`
				} else {
					out += string(r)
				}
			}
			return out + "'"
		}
	}
	return s
}
