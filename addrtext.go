package connpool

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"
)

// addrOption is one "key=value" of the text form. String writes options in the order of
// addrOptions.
type addrOption struct {
	key, field string
	set        func(a *Addr, value string) error
	show       func(a *Addr) string // "" for a value that is left out
}

var addrOptions = [...]addrOption{
	{"dscp", "QoS.DSCP", func(a *Addr, v string) error {
		n, err := number(v, 63)
		a.QoS.DSCP = uint8(n)
		return err
	}, func(a *Addr) string { return showNumber(int(a.QoS.DSCP)) }},
	{"delay", "QoS.Delay", func(a *Addr, v string) error {
		if a.QoS.Delay = v == "true"; v != "true" && v != "false" {
			return errors.New("use true or false")
		}
		return nil
	}, func(a *Addr) string {
		if a.QoS.Delay {
			return "true"
		}
		return ""
	}},
	{"keepalive", "QoS.KeepAlive", func(a *Addr, v string) error {
		if v == "off" {
			a.QoS.KeepAlive = -1
			return nil
		}
		d, err := time.ParseDuration(v)
		if err != nil || d <= 0 {
			// 0 could mean off, or the default; users disagree.
			return errors.New("use a duration above zero, such as 30s, or off")
		}
		a.QoS.KeepAlive = d
		return nil
	}, func(a *Addr) string {
		if a.QoS.KeepAlive < 0 {
			return "off"
		}
		return showDuration(a.QoS.KeepAlive)
	}},
	{"user-timeout", "QoS.UserTimeout", func(a *Addr, v string) error {
		d, err := time.ParseDuration(v)
		if err != nil {
			return errors.New("use a duration, such as 30s or 1500ms")
		}
		a.QoS.UserTimeout = d
		return nil
	}, func(a *Addr) string { return showDuration(a.QoS.UserTimeout) }},
	{"send-buffer", "QoS.SendBuffer", func(a *Addr, v string) error {
		n, err := number(v, maxBuffer)
		a.QoS.SendBuffer = n
		return err
	}, func(a *Addr) string { return showNumber(a.QoS.SendBuffer) }},
	{"recv-buffer", "QoS.RecvBuffer", func(a *Addr, v string) error {
		n, err := number(v, maxBuffer)
		a.QoS.RecvBuffer = n
		return err
	}, func(a *Addr) string { return showNumber(a.QoS.RecvBuffer) }},
	{"server-name", "ServerName", func(a *Addr, v string) error {
		a.ServerName = v
		return nil
	}, func(a *Addr) string { return a.ServerName }},
	{"scope", "Scope", func(a *Addr, v string) error {
		a.Scope = v
		return nil
	}, func(a *Addr) string { return a.Scope }},
}

func number(v string, limit int) (int, error) {
	n, err := strconv.ParseUint(v, 10, 31)
	if err != nil || int(n) > limit {
		return 0, fmt.Errorf("use a whole number, 0 to %d", limit)
	}
	return int(n), nil
}

func showNumber(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

func showDuration(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return d.String()
}

// knownKeys lists the known keys, for the error about an unknown one.
func knownKeys() string {
	keys := make([]string, len(addrOptions))
	for i := range addrOptions {
		keys[i] = addrOptions[i].key
	}
	return strings.Join(keys, ", ")
}

// String returns the text form of a, which [ParseAddr] turns back into a's
// canonical form. It is printable ASCII: any other byte is written %XX. Text
// made of an invalid Addr is for reading only; ParseAddr refuses it.
func (a Addr) String() string {
	if a == (Addr{}) {
		return "invalid Addr"
	}
	if c, err := a.canonical(); err == nil {
		a = c
	}
	return string(a.appendTo(nil))
}

// AppendText appends the text form of a to b, like [Addr.MarshalText].
func (a Addr) AppendText(b []byte) ([]byte, error) {
	if a == (Addr{}) {
		return b, nil
	}
	c, err := a.canonical()
	if err != nil {
		return b, err
	}
	return c.appendTo(b), nil
}

// MarshalText returns the same text as String. The zero Addr is the empty text; any other
// invalid Addr is an error.
func (a Addr) MarshalText() ([]byte, error) { return a.AppendText([]byte{}) }

// UnmarshalText is [ParseAddr], but accepts the empty text for the zero Addr. After an
// error a is unchanged.
func (a *Addr) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*a = Addr{}
		return nil
	}
	parsed, err := ParseAddr(string(text))
	if err == nil {
		*a = parsed
	}
	return err
}

func (a *Addr) appendTo(b []byte) []byte {
	b = appendEscaped(b, string(a.Transport), "+")
	switch {
	case a.Transport == Unix && strings.HasPrefix(a.Host, "//"):
		b = append(b, ":/%2F"...) // ParseAddr refuses "unix://"
		b = appendEscaped(b, a.Host[2:], "/@:+,=")
	case a.Transport == Unix:
		b = append(b, ':')
		b = appendEscaped(b, a.Host, "/@:+,=")
	case strings.Contains(a.Host, ":"):
		b = append(b, "://["...)
		b = appendEscaped(b, a.Host, ":/")
		b = append(b, ']')
	default:
		b = append(b, "://"...)
		b = appendEscaped(b, a.Host, "/")
	}
	sep := byte('?')
	option := func(key, value string) {
		if value != "" {
			b = append(append(append(b, sep), key...), '=')
			b = appendEscaped(b, value, ":/,")
			sep = '&'
		}
	}
	switch {
	case a.Port == 0:
	case a.Transport == Unix:
		option("port", strconv.Itoa(int(a.Port))) // invalid, and not part of the path
	default:
		b = strconv.AppendUint(append(b, ':'), uint64(a.Port), 10)
	}
	for i := range addrOptions {
		option(addrOptions[i].key, addrOptions[i].show(a))
	}
	return b
}

// appendEscaped appends s and writes as %XX each byte that is neither unreserved in URLs
// nor in keep.
func appendEscaped(b []byte, s, keep string) []byte {
	const hex = "0123456789ABCDEF"
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9',
			c == '-', c == '.', c == '_', c == '~', strings.IndexByte(keep, c) >= 0:
			b = append(b, c)
		default:
			b = append(b, '%', hex[c>>4], hex[c&15])
		}
	}
	return b
}

// unescape is the inverse of appendEscaped. bad is the index of a '%' that two
// hexadecimal digits do not follow, or -1.
func unescape(s string) (raw string, bad int) {
	if strings.IndexByte(s, '%') < 0 {
		return s, -1
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '%' {
			if !isEscape(s[i:]) {
				return "", i
			}
			n, _ := strconv.ParseUint(s[i+1:i+3], 16, 8)
			c, i = byte(n), i+2
		}
		b = append(b, c)
	}
	return string(b), -1
}

// isEscape reports whether s begins with a '%' and two hexadecimal digits.
func isEscape(s string) bool {
	if len(s) < 3 {
		return false
	}
	_, err := strconv.ParseUint(s[1:3], 16, 8)
	return err == nil && s[0] == '%'
}

// parseAddrError is an error of ParseAddr: what is wrong, and where.
type parseAddrError struct {
	text string
	at   int // text[at:] is where parsing failed
	what string
	err  error
}

func (e *parseAddrError) Unwrap() error { return e.err }

func (e *parseAddrError) Error() string {
	// Text before an '@' may be credentials. ParseAddr refuses it, and the error must not
	// carry it into a log. Only a Unix path cannot hold credentials.
	text, hidden, at := e.text, 0, ""
	if end := strings.LastIndexByte(text, '@'); end > 0 && !strings.HasPrefix(text, "unix:") {
		begin := 0
		if i := strings.Index(text[:end], "://"); i >= 0 {
			begin = i + len("://")
		}
		text, hidden = text[:begin]+"xxxxx"+text[end:], end
	}
	switch {
	case e.at >= len(e.text):
		at = " (at the end)"
	case e.at > 0 && e.at >= hidden:
		at = " (at " + strconv.Quote(e.text[e.at:]) + ")"
	}
	return "connpool: ParseAddr(" + strconv.Quote(text) + "): " + e.what + at
}

const badEscape = "a '%' begins an escape of two hexadecimal digits: write %25 for the character itself"

// ParseAddr reads the text form of an address and returns its canonical form:
//
//	tcp://host:port             also tls://; IPv6 as in tcp://[fe80::1%25eth0]:502
//	unix:/run/x.sock            a path
//	unix:@name                  an abstract name
//	name://host                 a transport of Config.Dialers
//	name://host:port
//
// Options may follow after a "?", separated by "&", in any order:
//
//	dscp=0..63                  delay=true|false
//	keepalive=DURATION|off      user-timeout=DURATION
//	send-buffer=BYTES           recv-buffer=BYTES
//	server-name=NAME            scope=TEXT
//
// as in "tls://db.example:5432?dscp=46&server-name=x&scope=t7". Host, path and values may
// hold any byte as %XX; '+' is a plus. The '%' before an IPv6 zone may be written as it
// is if the text after it does not look like an escape. An unknown, repeated or empty
// option is an error: leave an option out to leave its field unset. Errors tell what is
// wrong and where, and are [fs.ErrInvalid].
func ParseAddr(s string) (Addr, error) {
	p := addrParser{text: s, where: make(map[string]int)}
	if err := p.parse(); err != nil {
		return Addr{}, err
	}
	a, err := p.addr.canonical()
	var wrong *addrError
	if errors.As(err, &wrong) {
		return Addr{}, &parseAddrError{s, p.where[wrong.field], wrong.field + " " + wrong.what, wrong}
	}
	return a, nil
}

// MustParseAddr is [ParseAddr] for an address that is known to be good; it
// panics if it is not.
func MustParseAddr(s string) Addr {
	a, err := ParseAddr(s)
	if err != nil {
		panic(err)
	}
	return a
}

type addrParser struct {
	text  string
	addr  Addr
	where map[string]int // field of Addr: its offset in text
}

func (p *addrParser) fail(at int, what string) error {
	return &parseAddrError{p.text, at, what, fs.ErrInvalid}
}

func (p *addrParser) parse() error {
	const forms = "no transport at the beginning: write tcp://host:port, tls://host:port, unix:/path, or name://host for a name of Config.Dialers (a-z 0-9 + . -)"
	body, query, hasOptions := strings.Cut(p.text, "?")
	name, rest, found := strings.Cut(body, ":")
	slashes := strings.HasPrefix(rest, "//")
	p.addr.Transport = Transport(name)
	if !found || p.addr.Transport.validate() != nil || p.addr.Transport != Unix && !slashes {
		return p.fail(0, forms)
	}
	at := len(name) + len(":")
	var err error
	switch {
	case p.addr.Transport != Unix:
		err = p.parseHostPort(rest[len("//"):], at+len("//"))
	case slashes:
		// A URL parser would read "/run", a path "//run": two keys for one socket.
		err = p.fail(at, "a Unix socket is written without //, as in unix:/run/x.sock")
	default:
		err = p.parseHost("", rest, at)
	}
	if err != nil || !hasOptions {
		return err
	}
	return p.parseOptions(query, len(body)+len("?"))
}

// parseHost parses a host. literal is the host as written, s the same with its escapes
// undone.
func (p *addrParser) parseHost(literal, s string, at int) error {
	host, bad := unescape(s)
	if bad >= 0 {
		return p.fail(at+len(literal)+bad, badEscape)
	}
	p.addr.Host, p.where["Host"] = literal+host, at
	return nil
}

func (p *addrParser) parseHostPort(s string, at int) error {
	internet := p.addr.Transport == TCP || p.addr.Transport == TLS
	if internet && strings.IndexByte(s, '@') >= 0 {
		return p.fail(at, "host "+noCredentials)
	}

	host, hostAt, tail := s, at, "" // tail is ":port", if there is one
	bracketed := strings.HasPrefix(s, "[")
	if bracketed {
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return p.fail(at, "the bracket is not closed")
		}
		host, hostAt, tail = s[1:end], at+1, s[end+1:]
	} else if i := strings.IndexByte(s, ':'); i >= 0 {
		host, tail = s[:i], s[i:]
	}
	tailAt := at + len(s) - len(tail)

	var err error
	switch zone := strings.IndexByte(host, '%'); {
	case !internet || !bracketed || zone < 0 || strings.HasPrefix(host[zone:], "%25"):
		err = p.parseHost("", host, hostAt)
	case isEscape(host[zone:]):
		err = p.fail(hostAt+zone, "this may be an escape or a zone: write %25 for the '%' before a zone")
	default:
		err = p.parseHost(host[:zone+1], host[zone+1:], hostAt)
	}
	if err != nil {
		return err
	}

	p.where["Port"] = tailAt
	switch {
	case bracketed && !strings.Contains(p.addr.Host, ":"):
		return p.fail(at, "brackets are for a host with a ':' in it, such as an IPv6 address: leave them out")
	case tail == "":
		return nil
	case tail[0] != ':':
		return p.fail(tailAt, "only :port may follow the closing bracket")
	case strings.IndexByte(tail[1:], ':') >= 0:
		return p.fail(at, "a host with a ':' in it, such as an IPv6 address, needs brackets, as in tcp://[::1]:80")
	}
	port, err := strconv.ParseUint(tail[1:], 10, 16)
	if err != nil || port == 0 {
		return p.fail(tailAt+1, "the port must be a number, 1 to 65535, and the last before any options")
	}
	p.addr.Port = uint16(port)
	return nil
}

func (p *addrParser) parseOptions(query string, at int) error {
	for part := range strings.SplitSeq(query, "&") {
		key, value, _ := strings.Cut(part, "=")
		i := slices.IndexFunc(addrOptions[:], func(o addrOption) bool { return o.key == key })
		if i < 0 {
			return p.fail(at, "unknown option: known are "+knownKeys())
		}
		o := &addrOptions[i]
		if _, twice := p.where[o.field]; twice {
			return p.fail(at, key+" is given twice")
		}
		// A template writes an empty value for a variable that is not set. An empty scope
		// would then be shared by all such users.
		if value == "" {
			return p.fail(at, key+" has no value: leave it out if it is not set")
		}
		raw, bad := unescape(value)
		if bad >= 0 {
			return p.fail(at+len(key)+len("=")+bad, badEscape)
		}
		if err := o.set(&p.addr, raw); err != nil {
			return p.fail(at, key+": "+err.Error())
		}
		p.where[o.field] = at
		at += len(part) + len("&")
	}
	return nil
}
