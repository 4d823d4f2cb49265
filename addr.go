package connpool

import (
	"cmp"
	"fmt"
	"io/fs"
	"math"
	"net/netip"
	"strings"
	"time"
)

// Transport names how the bytes travel. The pool itself opens the three below; the
// function in Config.Dialers under its name opens any other. A name begins with a-z and
// goes on with a-z, 0-9, '+', '.' and '-'.
type Transport string

const (
	TCP  Transport = "tcp"
	TLS  Transport = "tls"  // over TCP
	Unix Transport = "unix" // a stream socket of the Unix domain
)

// Addr names a peer, the kind of connection to it and the quality of service. It is a
// plain value: compare it with ==, use it as a map key, send it as text or JSON. Two Addr
// share connections exactly if their canonical forms are equal in every field; a field
// that is not set is a value like any other, never a wildcard.
//
// The canonical form folds what the network does not distinguish, and nothing else: DNS
// names of TCP and TLS become lower case and lose one final dot, IP addresses take the
// form of [netip.Addr.String], and every negative KeepAlive becomes -1. [Pool] and
// [ParseAddr] make the canonical form themselves.
//
// The zero Addr is invalid. No field may hold a secret: errors, statistics and logs show
// all fields.
type Addr struct {
	Transport Transport

	// Host is, for TCP and TLS, a DNS name (other alphabets in their xn-- form) or an IP
	// address without brackets, IPv6 with its zone if it needs one: "fe80::1%eth0". The
	// zone is kept as it is, and so is an IPv4 address written as IPv6: neither equals
	// its shorter form. Because a name loses its final dot, the resolver's search list
	// applies to it. For Unix it is the path of the socket, or "@name" for an abstract
	// socket (Linux only); write "./@" for a path that begins with "@". 107 bytes at
	// most; some systems accept a few less and fail the dial. For other transports it is
	// whatever their dialer accepts, byte for byte, up to 1024 bytes.
	Host string

	// Port is 1 to 65535 for TCP and TLS, 0 for Unix. For other transports 0
	// means none.
	Port uint16

	// ServerName is the name (or IP address) that TLS sends and verifies, if it is not
	// Host. "" means Host, but is another key than Host spelled out. It may be set for
	// TLS and, byte for byte and up to 1024 bytes, for other transports.
	ServerName string

	// Scope keeps connections apart whose other fields are equal: those of two tenants,
	// or of two sets of credentials. Any bytes, up to 1024; "" is a scope of its own. It
	// may be a tag derived from a secret, but not the secret, because String shows it as
	// it is.
	Scope string

	QoS QoS
}

// QoS is set on the socket of each new connection. It is part of the key: connections of
// different QoS never replace each other. The zero QoS leaves everything as package net
// and the system have it. No field is ignored: a field that the system, or the kind of
// socket, cannot honour fails the dial with an error that is [errors.ErrUnsupported].
// Unix sockets have the two buffers only. For other transports the dialer applies the
// QoS, see [QoS.Control].
type QoS struct {
	// DSCP is the class of service in the header of each packet we send, the first SYN
	// included: 0 to 63. 0 leaves the system's default, which is 0 as a rule. Linux,
	// macOS and the BSDs.
	DSCP uint8

	// Delay leaves Nagle's algorithm on: small writes wait until earlier data is
	// acknowledged. false sends them at once (TCP_NODELAY). Linux, macOS, the BSDs and
	// Windows.
	Delay bool

	// KeepAlive is the time without traffic before the first keep-alive probe, and
	// between probes: whole seconds, up to 32767 s. 0 is the default of package net, 15
	// s; negative sends no probes. Linux, macOS, FreeBSD, NetBSD, DragonFly and Windows;
	// OpenBSD can only switch probes off.
	KeepAlive time.Duration

	// UserTimeout is how long sent data, or a keep-alive probe, may stay unacknowledged
	// before the system breaks the connection: whole milliseconds, up to 2147483647 ms. 0
	// is the system's default, which is many minutes; it is never negative. Linux only.
	UserTimeout time.Duration

	// SendBuffer and RecvBuffer are the sizes of the socket's buffers in bytes. The pool
	// sets them before connecting, because connecting fixes the window that TCP can
	// offer. 0 lets the system size the buffers as it goes; the sizes are never negative,
	// and 1073741823 at most. A size beyond the system's limit fails the dial; one below
	// its minimum (a few KiB on Linux) is raised to the minimum. Linux, macOS, the BSDs
	// and Windows.
	SendBuffer int
	RecvBuffer int
}

const (
	maxFree      = 1024 // bytes in a free-form field
	maxUnixPath  = 107  // sun_path on Linux, without its final NUL
	maxKeepAlive = 32767 * time.Second
	maxBuffer    = math.MaxInt32 / 2 // Linux doubles the size, in an int
)

const (
	badTransport  = "is no transport: use tcp, tls, unix or a name of Config.Dialers, which is a-z and then a-z 0-9 + . -"
	noCredentials = `holds "@": credentials have no place in an address, give them in Config.Setup`
)

// addrError describes what is wrong with one field. It is fs.ErrInvalid.
type addrError struct{ field, what string }

func (e *addrError) Error() string { return "connpool: Addr." + e.field + " " + e.what }
func (e *addrError) Unwrap() error { return fs.ErrInvalid }

// contradicts returns the error for a field that the transport does not use.
func contradicts(field, why string) error {
	return &addrError{field, "and Addr.Transport contradict each other: " + why}
}

// Validate reports what is wrong with a, or nil if a pool can use it. An Addr
// is valid whether or not it is in canonical form. Errors are
// [fs.ErrInvalid].
func (a Addr) Validate() error {
	_, err := a.canonical()
	return err
}

// canonical returns the canonical form of a, the only form that may be a key; with an
// error it returns a itself. No other function folds anything. Every loan calls
// canonical, so it does not allocate if there is nothing to fold.
func (a Addr) canonical() (Addr, error) {
	c, err := a, a.Transport.validate()
	if err != nil {
		return a, &addrError{"Transport", err.Error()}
	}
	if err := a.QoS.validate(); err != nil {
		return a, err
	}
	switch a.Transport {
	case TCP, TLS:
		if c.Host, err = canonicalHost("Host", a.Host); err != nil {
			return a, err
		}
		if a.Port == 0 {
			return a, &addrError{"Port", "is not set: use 1 to 65535"}
		}
		switch {
		case a.ServerName == "":
		case a.Transport == TCP:
			return a, contradicts("ServerName", "tcp verifies no name; use tls, or leave ServerName empty")
		case strings.Contains(a.ServerName, "%"):
			return a, &addrError{"ServerName", "has a zone, which no certificate holds: leave it out"}
		default:
			if c.ServerName, err = canonicalHost("ServerName", a.ServerName); err != nil {
				return a, err
			}
		}
	case Unix:
		if err := a.validateUnix(); err != nil {
			return a, err
		}
	default:
		switch {
		case a.Host == "":
			return a, &addrError{"Host", "is empty: give what the dialer of " + string(a.Transport) + " takes"}
		case len(a.Host) > maxFree:
			return a, tooLong("Host", a.Host, maxFree)
		case len(a.ServerName) > maxFree:
			return a, tooLong("ServerName", a.ServerName, maxFree)
		}
	}
	if len(a.Scope) > maxFree {
		return a, tooLong("Scope", a.Scope, maxFree)
	}
	if a.QoS.KeepAlive < 0 {
		c.QoS.KeepAlive = -1
	}
	return c, nil
}

func tooLong(field, value string, limit int) error {
	return &addrError{field, fmt.Sprintf("is %d bytes long: use %d at most", len(value), limit)}
}

// validate returns an error if t does not have the form of a transport's name.
func (t Transport) validate() error {
	for i := range len(t) {
		switch c := t[i]; {
		case 'a' <= c && c <= 'z':
		case i > 0 && ('0' <= c && c <= '9' || c == '+' || c == '.' || c == '-'):
		default:
			return fmt.Errorf("%q %s", string(t), badTransport)
		}
	}
	if t == "" {
		return fmt.Errorf(`"" %s`, badTransport)
	}
	return nil
}

// validate checks each field on its own, for any transport.
func (q QoS) validate() error {
	switch {
	case q.DSCP > 63:
		return &addrError{"QoS.DSCP", fmt.Sprintf("is %d: use 0 to 63 (DSCP is the upper six bits of the TOS byte)", q.DSCP)}
	case q.KeepAlive > 0 && (q.KeepAlive%time.Second != 0 || q.KeepAlive > maxKeepAlive):
		return &addrError{"QoS.KeepAlive", fmt.Sprintf("is %v: use whole seconds, up to %v", q.KeepAlive, maxKeepAlive)}
	case q.UserTimeout < 0 || q.UserTimeout%time.Millisecond != 0 || q.UserTimeout > math.MaxInt32*time.Millisecond:
		return &addrError{"QoS.UserTimeout", fmt.Sprintf("is %v: use whole milliseconds, 0 to %v", q.UserTimeout, math.MaxInt32*time.Millisecond)}
	case q.SendBuffer < 0 || q.SendBuffer > maxBuffer:
		return &addrError{"QoS.SendBuffer", fmt.Sprintf("is %d: use 0 to %d bytes", q.SendBuffer, maxBuffer)}
	case q.RecvBuffer < 0 || q.RecvBuffer > maxBuffer:
		return &addrError{"QoS.RecvBuffer", fmt.Sprintf("is %d: use 0 to %d bytes", q.RecvBuffer, maxBuffer)}
	}
	return nil
}

func (a Addr) validateUnix() error {
	switch {
	case a.Host == "" || a.Host == "@":
		return &addrError{"Host", `is empty: give the path of the socket, or "@name" for an abstract one`}
	case len(a.Host) > maxUnixPath:
		return tooLong("Host", a.Host, maxUnixPath)
	case strings.IndexByte(a.Host, 0) >= 0:
		return &addrError{"Host", `holds a NUL byte, which ends a path: leave it out (an abstract name begins with "@")`}
	case a.Port != 0:
		return contradicts("Port", "a Unix socket has no port; leave Port 0")
	case a.ServerName != "":
		return contradicts("ServerName", "a Unix socket verifies no name; leave ServerName empty")
	case a.QoS.DSCP != 0:
		return contradicts("QoS.DSCP", "a Unix socket sends no packets; leave DSCP 0")
	case a.QoS.Delay:
		return contradicts("QoS.Delay", "a Unix socket never delays; leave Delay false")
	case a.QoS.KeepAlive != 0:
		return contradicts("QoS.KeepAlive", "a Unix socket sends no probes; leave KeepAlive 0")
	case a.QoS.UserTimeout != 0:
		return contradicts("QoS.UserTimeout", "a Unix socket awaits no acknowledgement; leave UserTimeout 0")
	}
	return nil
}

// canonicalHost folds a DNS name or an IP address. It refuses a host that looks like
// either and is not, because resolvers disagree about such a host: some read "127.1" as
// 127.0.0.1 and "010.0.0.1" as 8.0.0.1, and then one key would stand for two peers.
func canonicalHost(field, host string) (string, error) {
	bad := func(format string, args ...any) (string, error) {
		return "", &addrError{field, fmt.Sprintf(format, args...)}
	}
	switch {
	case host == "":
		return bad("is empty: give a DNS name or an IP address")
	case strings.IndexByte(host, ':') >= 0:
		return canonicalIPv6(field, host)
	case strings.IndexByte(host, '@') >= 0:
		return bad(noCredentials)
	}
	name := strings.TrimSuffix(host, ".")
	if len(name) > 253 {
		return "", tooLong(field, host, 253)
	}
	label := 0 // start of the current label
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		case c == '.':
			if n := i - label; n < 1 || n > 63 {
				return bad("%q has a label of %d bytes: use 1 to 63", host, n)
			}
			label = i + 1
		case c >= 0x80:
			return bad("%q is not ASCII: give the name in its xn-- form", host)
		default:
			return bad("%q holds %q, which neither a DNS name nor an IP address has", host, rune(c))
		}
	}
	if n := len(name) - label; n < 1 || n > 63 {
		return bad("%q has a label of %d bytes: use 1 to 63", host, n)
	}
	if isNumber(name[label:]) {
		if _, err := netip.ParseAddr(host); err != nil {
			return bad("%q looks like an IPv4 address but is not: write four decimal numbers without leading zeros and no final dot", host)
		}
		return host, nil
	}
	return strings.ToLower(name), nil
}

// isNumber reports whether some resolver may read the last label of a name as a number,
// and so the name as an IPv4 address.
func isNumber(label string) bool {
	digits, hex := label, false
	if len(label) >= 2 && label[0] == '0' && label[1]|0x20 == 'x' {
		digits, hex = label[2:], true
	}
	for i := range len(digits) {
		c := digits[i]
		if (c < '0' || c > '9') && !(hex && 'a' <= c|0x20 && c|0x20 <= 'f') {
			return false
		}
	}
	return true
}

func canonicalIPv6(field, host string) (string, error) {
	// The zone is cut off first because netip interns zones, which allocates.
	text, zone, zoned := strings.Cut(host, "%")
	ip, err := netip.ParseAddr(text)
	what := ""
	switch {
	case err == nil && !zoned:
	case err == nil && zone == "":
		what = fmt.Sprintf("%q has an empty zone: name the interface, or leave %% out", host)
	case err == nil && len(zone) > maxFree:
		what = fmt.Sprintf("has a zone of %d bytes: use %d at most", len(zone), maxFree)
	case err == nil:
	case strings.IndexByte(host, '@') >= 0:
		what = noCredentials
	case strings.Contains(host, "://"):
		what = fmt.Sprintf("%q is a whole address: ParseAddr reads it", host)
	case host[0] == '[':
		what = fmt.Sprintf("%q has brackets: write the IPv6 address without them, and its port in Port", host)
	case strings.Count(host, ":") == 1:
		what = fmt.Sprintf("%q holds a port: write that in Port", host)
	default:
		what = fmt.Sprintf("%q is no IPv6 address: %v", host, err)
	}
	if what != "" {
		return "", &addrError{field, what}
	}
	var buf [48]byte
	canon := ip.AppendTo(buf[:0])
	switch {
	case string(canon) == text:
		return host, nil
	case zoned:
		return string(canon) + "%" + zone, nil
	}
	return string(canon), nil
}

// Compare orders Addr field by field as they are declared, QoS last. It compares the
// fields as they are, not their canonical forms: the result is 0 exactly if a == b.
func (a Addr) Compare(b Addr) int {
	p, q := a.QoS, b.QoS
	delay := 0
	if p.Delay != q.Delay {
		if delay = -1; p.Delay {
			delay = 1
		}
	}
	return cmp.Or(
		cmp.Compare(a.Transport, b.Transport),
		cmp.Compare(a.Host, b.Host),
		cmp.Compare(a.Port, b.Port),
		cmp.Compare(a.ServerName, b.ServerName),
		cmp.Compare(a.Scope, b.Scope),
		cmp.Compare(p.DSCP, q.DSCP),
		delay,
		cmp.Compare(p.KeepAlive, q.KeepAlive),
		cmp.Compare(p.UserTimeout, q.UserTimeout),
		cmp.Compare(p.SendBuffer, q.SendBuffer),
		cmp.Compare(p.RecvBuffer, q.RecvBuffer),
	)
}
