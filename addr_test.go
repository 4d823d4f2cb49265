package connpool

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"math/rand/v2"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/seed-ecb488c9/connpool/internal/patience"
)

// fullAddr has every field set that TLS allows.
var fullAddr = Addr{
	Transport: TLS, Host: "db.example", Port: 5432, ServerName: "x.example", Scope: "t7",
	QoS: QoS{DSCP: 46, Delay: true, KeepAlive: 90 * time.Second, UserTimeout: 1500 * time.Millisecond, SendBuffer: 65536, RecvBuffer: 32768},
}

// changed returns a changed copy.
func changed(a Addr, change func(*Addr)) Addr {
	change(&a)
	return a
}

// addrMutations has, for each field of Addr and QoS, a change to another valid
// value. A field that is missing here fails the tests that range over fields.
var addrMutations = map[string]func(*Addr){
	"Transport":       func(a *Addr) { a.Transport = "quic" },
	"Host":            func(a *Addr) { a.Host = "db2.example" },
	"Port":            func(a *Addr) { a.Port++ },
	"ServerName":      func(a *Addr) { a.ServerName = "y.example" },
	"Scope":           func(a *Addr) { a.Scope = "T7" },
	"QoS.DSCP":        func(a *Addr) { a.QoS.DSCP = 10 },
	"QoS.Delay":       func(a *Addr) { a.QoS.Delay = !a.QoS.Delay },
	"QoS.KeepAlive":   func(a *Addr) { a.QoS.KeepAlive = 7 * time.Second },
	"QoS.UserTimeout": func(a *Addr) { a.QoS.UserTimeout = 7 * time.Millisecond },
	"QoS.SendBuffer":  func(a *Addr) { a.QoS.SendBuffer = 7 },
	"QoS.RecvBuffer":  func(a *Addr) { a.QoS.RecvBuffer = 7 },
}

func addrFields() (names []string) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Addr]()) {
		if f.Type != reflect.TypeFor[QoS]() {
			names = append(names, f.Name)
		}
	}
	return append(names, qosFields("QoS.")...)
}

func qosFields(prefix string) (names []string) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[QoS]()) {
		names = append(names, prefix+f.Name)
	}
	return names
}

// BETA-11, BETA-X02: a field that the text form, the order or the key forgot
// would let two kinds of connection stand in for each other.
func TestEveryFieldIsPartOfTheKeyTheTextAndTheOrder(t *testing.T) {
	require.ElementsMatch(t, addrFields(), slices.Collect(maps.Keys(addrMutations)), "each field needs a mutation, and nothing else has one")
	for _, base := range []Addr{{Transport: TLS, Host: "db.example", Port: 5432}, fullAddr} {
		for name, mutate := range addrMutations {
			other := changed(base, mutate)
			require.NoError(t, other.Validate(), name)
			canon, err := other.canonical()
			require.NoError(t, err, name)
			assert.NotEqual(t, base, canon, name)
			assert.NotZero(t, base.Compare(other), name)
			assert.NotEqual(t, base.String(), other.String(), name)
			back, err := ParseAddr(other.String())
			require.NoError(t, err, name)
			assert.Equal(t, other, back, name)
		}
	}
}

// BETA-02, BETA-X02
func TestEqualAddrsBuiltInDifferentPlacesAreOneMapKey(t *testing.T) {
	byField := Addr{Port: 5432, Host: strings.Join([]string{"db", "example"}, "."), Transport: "tls"}
	byText, err := ParseAddr("tls://" + byField.Host + ":5432")
	require.NoError(t, err)
	m := map[Addr]int{byField: 1}
	m[byText]++
	assert.Equal(t, map[Addr]int{{Transport: TLS, Host: "db.example", Port: 5432}: 2}, m)
}

// TDBC-X01
func TestOptionsInAnyOrderAreOneKey(t *testing.T) {
	text := fullAddr.String()
	head, query, _ := strings.Cut(text, "?")
	parts := strings.Split(query, "&")
	require.Len(t, parts, len(addrOptions))
	for i := range parts {
		turned := append(slices.Clone(parts[i:]), parts[:i]...)
		slices.Reverse(turned)
		a, err := ParseAddr(head + "?" + strings.Join(turned, "&"))
		require.NoError(t, err)
		assert.Equal(t, fullAddr, a)
		assert.Equal(t, text, a.String(), "the text has one order")
	}
}

// BETA-X02
func TestAddrConvertsToTextAndBack(t *testing.T) {
	for _, tc := range []struct {
		text string
		addr Addr
	}{
		{"tcp://localhost:80", Addr{Transport: TCP, Host: "localhost", Port: 80}},
		{"tcp://192.0.2.1:65535", Addr{Transport: TCP, Host: "192.0.2.1", Port: 65535}},
		{"tcp://[::1]:1", Addr{Transport: TCP, Host: "::1", Port: 1}},
		{"tcp://[fe80::1%25eth0]:502", Addr{Transport: TCP, Host: "fe80::1%eth0", Port: 502}},
		{"tcp://[fe80::1%25%25%5D%20]:502", Addr{Transport: TCP, Host: "fe80::1%%] ", Port: 502}},
		{"tcp://[::ffff:192.0.2.1]:80", Addr{Transport: TCP, Host: "::ffff:192.0.2.1", Port: 80}},
		{"tls://db.example:5432?dscp=46&delay=true&keepalive=1m30s&user-timeout=1.5s&send-buffer=65536&recv-buffer=32768&server-name=x.example&scope=t7", fullAddr},
		{"tls://db.example:5432?keepalive=off&server-name=2001:db8::1", Addr{Transport: TLS, Host: "db.example", Port: 5432, ServerName: "2001:db8::1", QoS: QoS{KeepAlive: -1}}},
		{"tcp://h:1?scope=%26%3D%3F%23%25%2B%40%00%FF/%C3%A9", Addr{Transport: TCP, Host: "h", Port: 1, Scope: "&=?#%+@\x00\xff/é"}},
		{"unix:/run/x.sock", Addr{Transport: Unix, Host: "/run/x.sock"}},
		{"unix:x.sock", Addr{Transport: Unix, Host: "x.sock"}},
		{"unix:@abstract/", Addr{Transport: Unix, Host: "@abstract/"}},
		{"unix:/a%3Fb%20c:80?send-buffer=4096", Addr{Transport: Unix, Host: "/a?b c:80", QoS: QoS{SendBuffer: 4096}}},
		{"unix:/%2Fx//y", Addr{Transport: Unix, Host: "//x//y"}},
		{"mem://Pipe./A.", Addr{Transport: "mem", Host: "Pipe./A."}},
		{"mem://Pipe:7?server-name=N%C3%A9.&scope=s", Addr{Transport: "mem", Host: "Pipe", Port: 7, ServerName: "Né.", Scope: "s"}},
		{"a+b-c.9://[x:y%5B%5D%25z]", Addr{Transport: "a+b-c.9", Host: "x:y[]%z"}},
		{"a+b-c.9://[x:y]:9", Addr{Transport: "a+b-c.9", Host: "x:y", Port: 9}},
		{"ssh://me%40host:22", Addr{Transport: "ssh", Host: "me@host", Port: 22}},
	} {
		assert.Equal(t, tc.text, tc.addr.String())
		a, err := ParseAddr(tc.text)
		if assert.NoError(t, err) {
			assert.Equal(t, tc.addr, a)
		}
		assert.Equal(t, tc.addr, MustParseAddr(tc.text))
	}
}

// BETA-X02: every byte, in every field that may hold any.
func TestAnyByteSurvivesTheTextForm(t *testing.T) {
	for b := range 256 {
		odd := string([]byte{'a', byte(b), '1', byte(b)})
		for _, a := range []Addr{
			changed(fullAddr, func(a *Addr) { a.Scope = odd }),
			{Transport: Unix, Host: odd},
			{Transport: Unix, Host: odd[1:]},
			{Transport: Unix, Host: "@" + odd},
			{Transport: "mem", Host: odd, ServerName: odd},
			{Transport: "mem", Host: odd[1:], Port: 1},
			{Transport: "mem", Host: odd + ":", Port: 1},
			{Transport: TCP, Host: "fe80::1%" + odd, Port: 1},
			{Transport: TCP, Host: "fe80::1%" + odd[1:], Port: 1},
		} {
			if a.Transport == Unix && b == 0 {
				require.Error(t, a.Validate())
				continue
			}
			text := a.String()
			back, err := ParseAddr(text)
			require.NoError(t, err, text)
			require.Equal(t, a, back, text)
			requirePrintable(t, text)
		}
	}
}

func requirePrintable(t require.TestingT, text string) {
	for i := range len(text) {
		if text[i] <= ' ' || text[i] > '~' {
			require.Failf(t, "not printable ASCII", "%q", text)
		}
	}
}

// What other software takes for a URL must mean the same to it.
func TestURLReadersReadTheSameAddr(t *testing.T) {
	for _, a := range []Addr{
		fullAddr,
		{Transport: TCP, Host: "fe80::1%eth0", Port: 502},
		changed(fullAddr, func(a *Addr) { a.Scope = "a+b c&d=e;f#g%h?i" }),
	} {
		u, err := url.Parse(a.String())
		require.NoError(t, err)
		assert.Equal(t, string(a.Transport), u.Scheme)
		assert.Equal(t, a.Host, u.Hostname())
		assert.Equal(t, fmt.Sprint(a.Port), u.Port())
		q, err := url.ParseQuery(u.RawQuery)
		require.NoError(t, err)
		assert.Equal(t, a.Scope, q.Get("scope"))
		assert.Equal(t, a.ServerName, q.Get("server-name"))
	}
}

// BETA-X14
func TestCanonicalFormFoldsWhatDNSFoldsAndNothingElse(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"tcp://EXAMPLE.com.:80", "tcp://example.com:80"},
		{"tls://Db_1-A.Example:080?server-name=X.example.", "tls://db_1-a.example:80?server-name=x.example"},
		{"tls://h:1?server-name=2001:DB8:0::1", "tls://h:1?server-name=2001:db8::1"},
		{"tcp://%45xample.com:80", "tcp://example.com:80"},
		{"tcp://[2001:DB8:0:0::0001]:80", "tcp://[2001:db8::1]:80"},
		{"tcp://[::FFFF:c000:201]:80", "tcp://[::ffff:192.0.2.1]:80"},
		{"tcp://[FE80:0::1%25Eth0]:80", "tcp://[fe80::1%25Eth0]:80"},
		{"tcp://[fe80::1%Eth0]:80", "tcp://[fe80::1%25Eth0]:80"},
		{"tcp://[fe80::1%1]:80", "tcp://[fe80::1%251]:80"},
		{"tcp://[fe80::1%eth%200]:80", "tcp://[fe80::1%25eth%200]:80"},
		{"tcp://%3A%3A1:80", "tcp://[::1]:80"},
		{"tcp://h:1?keepalive=60s", "tcp://h:1?keepalive=1m0s"},
		{"tcp://h:1?dscp=0&delay=false&user-timeout=0&send-buffer=0&recv-buffer=00", "tcp://h:1"},
		{"tcp://h:1?scope=A+b", "tcp://h:1?scope=A%2Bb"},
		// As they are:
		{"unix:/Run/X.", "unix:/Run/X."},
		{"mem://Host.?server-name=Name.", "mem://Host.?server-name=Name."},
		{"mem://010.0.0.1", "mem://010.0.0.1"},
		{"mem://[2001:DB8::0]", "mem://[2001:DB8::0]"},
	} {
		a, err := ParseAddr(tc.text)
		if assert.NoError(t, err) {
			assert.Equal(t, tc.want, a.String())
			again, err := a.canonical()
			assert.NoError(t, err)
			assert.Equal(t, a, again)
		}
	}

	for _, pair := range [][2]Addr{
		{{Transport: TCP, Host: "EXAMPLE.com.", Port: 80}, {Transport: TCP, Host: "example.com", Port: 80}},
		{{Transport: TCP, Host: "h", Port: 80, QoS: QoS{KeepAlive: math.MinInt64}}, {Transport: TCP, Host: "h", Port: 80, QoS: QoS{KeepAlive: -1}}},
		{{Transport: TCP, Host: "FE80::1%E", Port: 80}, {Transport: TCP, Host: "fe80::1%E", Port: 80}},
	} {
		canon, err := pair[0].canonical()
		require.NoError(t, err)
		assert.Equal(t, pair[1], canon)
		assert.Equal(t, pair[1].String(), pair[0].String())
		assert.NotZero(t, pair[0].Compare(pair[1]), "Compare looks at the fields as they are")
	}

	// One peer perhaps, but not one key.
	different := []string{
		"tcp://[fe80::1]:1", "tcp://[fe80::1%25eth0]:1", "tcp://[fe80::1%25eth1]:1", "tcp://[fe80::1%25ETH1]:1",
		"tcp://192.0.2.1:1", "tcp://[::ffff:192.0.2.1]:1",
		"tls://h:1", "tls://h:1?server-name=h", "tcp://h:1",
		"tcp://h:1?scope=a", "tcp://h:1?scope=A", "tcp://h:1?scope=a.",
		"tcp://h:1?keepalive=15s", "tcp://h:1?keepalive=off",
		"unix:/x", "unix:/X", "unix:/./x", "unix:x", "unix:@x", "unix:./@x",
		"mem://h", "mem://H", "mem://h.", "mem://h:1",
	}
	keys := map[Addr]bool{}
	for _, text := range different {
		keys[MustParseAddr(text)] = true
	}
	assert.Len(t, keys, len(different))
}

// BETA-X14: port 0 and 65536, and all the others.
func TestParseErrorsShowWhereItBroke(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"", `ParseAddr(""): no transport at the beginning: write tcp://host:port, tls://host:port, unix:/path, or name://host for a name of Config.Dialers (a-z 0-9 + . -) (at the end)`},
		{"db", `(a-z 0-9 + . -)`},
		{"db:5432", `no transport at the beginning`},
		{"tcp:db:5432", `no transport at the beginning`},
		{"//db:5432", `no transport at the beginning`},
		{"://db:5432", `no transport at the beginning`},
		{"TCP://db:5432", `no transport at the beginning`},
		{"9p://db:5432", `no transport at the beginning`},
		{"tcp?x://db:5432", `no transport at the beginning`},
		{"tcp://", `Host is empty: give a DNS name or an IP address (at the end)`},
		{"mem://", `Host is empty: give what the dialer of mem takes (at the end)`},
		{"mem://:1", `Host is empty: give what the dialer of mem takes (at ":1")`},
		{"tcp://:80", `Host is empty: give a DNS name or an IP address (at ":80")`},
		{"tcp://db", `Port is not set: use 1 to 65535 (at the end)`},
		{"tcp://db?dscp=1", `Port is not set: use 1 to 65535 (at "?dscp=1")`},
		{"tcp://db:", `the port must be a number, 1 to 65535, and the last before any options (at the end)`},
		{"tcp://db:0", `(at "0")`},
		{"mem://db:0", `the port must be a number, 1 to 65535, and the last before any options (at "0")`},
		{"tcp://db:65536", `(at "65536")`},
		{"tcp://db:-1", `(at "-1")`},
		{"tcp://db:+1", `(at "+1")`},
		{"tcp://db:1_0", `(at "1_0")`},
		{"tcp://db:http", `(at "http")`},
		{"tcp://db:80/path?dscp=1", `(at "80/path?dscp=1")`},
		{"tcp://::1:80", `needs brackets, as in tcp://[::1]:80 (at "::1:80")`},
		{"tcp://[::1:80", `the bracket is not closed (at "[::1:80")`},
		{"tcp://[::1]80", `only :port may follow the closing bracket (at "80")`},
		{"tcp://[::1]", `Port is not set: use 1 to 65535 (at the end)`},
		{"tcp://[db]:80", `brackets are for a host with a ':' in it, such as an IPv6 address: leave them out (at "[db]:80")`},
		{"tcp://[]:80", `brackets are for`},
		{"tcp://[1:2]:80", `Host "1:2" holds a port: write that in Port (at "1:2]:80")`},
		{"tcp://[1:2:3]:80", `is no IPv6 address`},
		{"tcp://[fe80::1%ab]:80", `this may be an escape or a zone: write %25 for the '%' before a zone (at "%ab]:80")`},
		{"tcp://[fe80::1%25]:80", `has an empty zone: name the interface, or leave % out (at "fe80::1%25]:80")`},
		{"tcp://[fe80::1%]:80", `has an empty zone`},
		{"tcp://[fe80::1%25a%]:80", `write %25 for the character itself (at "%]:80")`},
		{"tcp://[fe80::1%eth%]:80", `write %25 for the character itself (at "%]:80")`},
		{"tcp://fe80%zz:80", `a '%' begins an escape of two hexadecimal digits: write %25 for the character itself (at "%zz:80")`},
		{"mem://[a:%b]:80", `write %25 for the character itself (at "%b]:80")`},
		{"mem://a%", `write %25 for the character itself (at "%")`},
		{"mem://a%2", `(at "%2")`},
		{"tcp://d b:80", `Host "d b" holds ' ', which neither a DNS name nor an IP address has (at "d b:80")`},
		{"tcp://127.1:80", `Host "127.1" looks like an IPv4 address but is not: write four decimal numbers without leading zeros and no final dot (at "127.1:80")`},
		{"unix:", `Host is empty: give the path of the socket, or "@name" for an abstract one (at the end)`},
		{"unix:@", `Host is empty`},
		{"unix:///run/x.sock", `a Unix socket is written without //, as in unix:/run/x.sock (at "///run/x.sock")`},
		{"unix:/a%zz", `(at "%zz")`},
		{"unix:/a%00b", `Host holds a NUL byte`},
		{"unix:/a?dscp=1", `QoS.DSCP and Addr.Transport contradict each other: a Unix socket sends no packets; leave DSCP 0 (at "dscp=1")`},
		{"unix:/a?scope=b&server-name=c", `(at "server-name=c")`},
		{"tcp://h:1?", `unknown option: known are dscp, delay, keepalive, user-timeout, send-buffer, recv-buffer, server-name, scope (at the end)`},
		{"tcp://h:1?dscp=1&", `unknown option: known are dscp, delay, keepalive, user-timeout, send-buffer, recv-buffer, server-name, scope (at the end)`},
		{"tcp://h:1?&dscp=1", `(at "&dscp=1")`},
		{"tcp://h:1?=1&dscp=1", `unknown option: known are dscp, delay, keepalive, user-timeout, send-buffer, recv-buffer, server-name, scope (at "=1&dscp=1")`},
		{"tcp://h:1?dcsp=1&delay=true", `(at "dcsp=1&delay=true")`},
		{"tcp://h:1?DSCP=1", `unknown option`},
		{"tcp://h:1?dscp=1;delay=true", `dscp: use a whole number, 0 to 63 (at "dscp=1;delay=true")`},
		{"tcp://h:1?dscp=1&delay=true&dscp=1", `dscp is given twice (at "dscp=1")`},
		{"tcp://h:1?delay=false&delay=false", `delay is given twice (at "delay=false")`},
		{"tcp://h:1?scope", `scope has no value: leave it out if it is not set (at "scope")`},
		{"tcp://h:1?scope=&dscp=1", `scope has no value: leave it out if it is not set (at "scope=&dscp=1")`},
		{"tcp://h:1?scope=a%2", `write %25 for the character itself (at "%2")`},
		{"tcp://h:1?dscp=64", `dscp: use a whole number, 0 to 63 (at "dscp=64")`},
		{"tcp://h:1?dscp=-1", `dscp: use a whole number`},
		{"tcp://h:1?dscp=0x10", `dscp: use a whole number`},
		{"tcp://h:1?dscp=99999999999999999999", `dscp: use a whole number`},
		{"tcp://h:1?delay=yes", `delay: use true or false (at "delay=yes")`},
		{"tcp://h:1?keepalive=30", `keepalive: use a duration above zero, such as 30s, or off (at "keepalive=30")`},
		{"tcp://h:1?keepalive=0s", `keepalive: use a duration above zero, such as 30s, or off`},
		{"tcp://h:1?keepalive=-1s", `keepalive: use a duration above zero, such as 30s, or off`},
		{"tcp://h:1?keepalive=1.5s", `QoS.KeepAlive is 1.5s: use whole seconds, up to 9h6m7s (at "keepalive=1.5s")`},
		{"tcp://h:1?keepalive=32768s", `QoS.KeepAlive is 9h6m8s: use whole seconds, up to 9h6m7s`},
		{"tcp://h:1?user-timeout=soon", `user-timeout: use a duration, such as 30s or 1500ms (at "user-timeout=soon")`},
		{"tcp://h:1?user-timeout=-1s", `QoS.UserTimeout is -1s: use whole milliseconds, 0 to 596h31m23.647s (at "user-timeout=-1s")`},
		{"tcp://h:1?user-timeout=1us", `QoS.UserTimeout is 1µs: use whole milliseconds`},
		{"tcp://h:1?send-buffer=1073741824", `send-buffer: use a whole number, 0 to 1073741823 (at "send-buffer=1073741824")`},
		{"tcp://h:1?recv-buffer=64k&scope=a", `recv-buffer: use a whole number, 0 to 1073741823 (at "recv-buffer=64k&scope=a")`},
		{"tcp://h:1?server-name=x", `ServerName and Addr.Transport contradict each other: tcp verifies no name; use tls, or leave ServerName empty (at "server-name=x")`},
		{"tls://h:1?scope=a&server-name=x%20y", `ServerName "x y" holds ' ', which neither a DNS name nor an IP address has (at "server-name=x%20y")`},
		{"tls://h:1?server-name=fe80::1%25a", `ServerName has a zone, which no certificate holds: leave it out`},
		{"tcp://h:1?scope=" + strings.Repeat("x", 1025), `Scope is 1025 bytes long: use 1024 at most (at "scope=xxx`},
	} {
		a, err := ParseAddr(tc.text)
		if assert.Error(t, err, tc.text) {
			assert.Contains(t, err.Error(), tc.want)
			assert.True(t, strings.HasPrefix(err.Error(), fmt.Sprintf("connpool: ParseAddr(%q): ", tc.text)), err.Error())
			assert.ErrorIs(t, err, fs.ErrInvalid)
			assert.Equal(t, KindUsage, KindOf(err))
		}
		assert.Zero(t, a)
		assert.PanicsWithError(t, err.Error(), func() { MustParseAddr(tc.text) })
	}
}

func TestValidateSaysWhatToChange(t *testing.T) {
	tcp := Addr{Transport: TCP, Host: "h", Port: 1}
	tls := Addr{Transport: TLS, Host: "h", Port: 1}
	unix := Addr{Transport: Unix, Host: "/x"}
	mem := Addr{Transport: "mem", Host: "x"}
	long := func(n int) string { return strings.Repeat("x", n) }
	host := func(h string) Addr { return changed(tcp, func(a *Addr) { a.Host = h }) }
	for _, tc := range []struct {
		addr Addr
		want string
	}{
		{Addr{}, `connpool: Addr.Transport "" is no transport: use tcp, tls, unix or a name of Config.Dialers, which is a-z and then a-z 0-9 + . -`},
		{Addr{Transport: "Tcp", Host: "h", Port: 1}, `connpool: Addr.Transport "Tcp" is no transport`},
		{Addr{Transport: "-x", Host: "h"}, `Addr.Transport "-x" is no transport`},
		{Addr{Transport: "a b", Host: "h"}, `Addr.Transport "a b" is no transport`},
		{Addr{Transport: "é", Host: "h"}, `is no transport`},

		{host(""), `connpool: Addr.Host is empty: give a DNS name or an IP address`},
		{host("."), `Addr.Host "." has a label of 0 bytes: use 1 to 63`},
		{host(".h"), `has a label of 0 bytes`},
		{host("a..b"), `has a label of 0 bytes`},
		{host("a.."), `has a label of 0 bytes`},
		{host(long(64)), `has a label of 64 bytes: use 1 to 63`},
		{host(long(64) + ".x"), `has a label of 64 bytes: use 1 to 63`},
		{host(strings.Repeat("x.", 127)), ``}, // 253 without its final dot
		{host(strings.Repeat("x.", 126) + "xx"), `Addr.Host is 254 bytes long: use 253 at most`},
		{host("bücher.example"), `is not ASCII: give the name in its xn-- form`},
		{host("a\x80"), `is not ASCII`},
		{host("a/b"), `Addr.Host "a/b" holds '/', which neither a DNS name nor an IP address has`},
		{host("a\x00"), `holds '\x00'`},
		{host("192.0.2.1%eth0"), `holds '%'`},
		{host("127.1"), `Addr.Host "127.1" looks like an IPv4 address but is not`},
		{host("010.0.0.1"), `looks like an IPv4 address but is not`},
		{host("1.2.3.4.5"), `looks like an IPv4 address but is not`},
		{host("1.2.3.256"), `looks like an IPv4 address but is not`},
		{host("1.2.3.4."), `looks like an IPv4 address but is not`},
		{host("2130706433"), `looks like an IPv4 address but is not`},
		{host("0x7f000001"), `looks like an IPv4 address but is not`},
		{host("db.0X1f"), `looks like an IPv4 address but is not`},
		{host("db.0x"), `looks like an IPv4 address but is not`},
		{host("db.0xg"), ``},
		{host("db.1x"), ``},
		{host("1.2.3.x4"), ``},
		{host("_srv._tcp.xn--bcher-kva.example"), ``},
		{host("db:5432"), `connpool: Addr.Host "db:5432" holds a port: write that in Port`},
		{host("[::1]:5432"), `Addr.Host "[::1]:5432" has brackets: write the IPv6 address without them, and its port in Port`},
		{host("[::1]"), `has brackets`},
		{host("tcp://db:5432"), `Addr.Host "tcp://db:5432" is a whole address: ParseAddr reads it`},
		{host("::1::"), `Addr.Host "::1::" is no IPv6 address: ParseAddr("::1::")`},
		{host("fe80::1%"), `Addr.Host "fe80::1%" has an empty zone: name the interface, or leave % out`},
		{host("fe80::1%" + long(1025)), `Addr.Host has a zone of 1025 bytes: use 1024 at most`},
		{host("fe80::1%" + long(1024)), ``},
		{Addr{Transport: TLS, Host: "h"}, `connpool: Addr.Port is not set: use 1 to 65535`},

		{changed(tcp, func(a *Addr) { a.ServerName = "x" }), `connpool: Addr.ServerName and Addr.Transport contradict each other: tcp verifies no name; use tls, or leave ServerName empty`},
		{changed(tls, func(a *Addr) { a.ServerName = "x" }), ``},
		{changed(tls, func(a *Addr) { a.ServerName = "192.0.2.1" }), ``},
		{changed(tls, func(a *Addr) { a.ServerName = "x:443" }), `connpool: Addr.ServerName "x:443" holds a port`},
		{changed(tls, func(a *Addr) { a.ServerName = "fe80::1%a" }), `connpool: Addr.ServerName has a zone`},

		{changed(unix, func(a *Addr) { a.Host = "" }), `connpool: Addr.Host is empty: give the path`},
		{changed(unix, func(a *Addr) { a.Host = "@" }), `connpool: Addr.Host is empty: give the path`},
		{changed(unix, func(a *Addr) { a.Host = "\x00x" }), `connpool: Addr.Host holds a NUL byte, which ends a path: leave it out (an abstract name begins with "@")`},
		{changed(unix, func(a *Addr) { a.Host = long(107) }), ``},
		{changed(unix, func(a *Addr) { a.Host = long(108) }), `connpool: Addr.Host is 108 bytes long: use 107 at most`},
		{changed(unix, func(a *Addr) { a.Port = 1 }), `connpool: Addr.Port and Addr.Transport contradict each other: a Unix socket has no port; leave Port 0`},
		{changed(unix, func(a *Addr) { a.ServerName = "x" }), `Addr.ServerName and Addr.Transport contradict each other: a Unix socket`},
		{changed(unix, func(a *Addr) { a.QoS.DSCP = 1 }), `Addr.QoS.DSCP and Addr.Transport contradict each other: a Unix socket`},
		{changed(unix, func(a *Addr) { a.QoS.Delay = true }), `Addr.QoS.Delay and Addr.Transport contradict each other: a Unix socket`},
		{changed(unix, func(a *Addr) { a.QoS.KeepAlive = -1 }), `Addr.QoS.KeepAlive and Addr.Transport contradict each other: a Unix socket`},
		{changed(unix, func(a *Addr) { a.QoS.UserTimeout = time.Second }), `Addr.QoS.UserTimeout and Addr.Transport contradict each other: a Unix socket`},
		{changed(unix, func(a *Addr) { a.QoS = QoS{SendBuffer: 1, RecvBuffer: 1} }), ``},

		{changed(mem, func(a *Addr) { a.Host = "" }), `connpool: Addr.Host is empty: give what the dialer of mem takes`},
		{changed(mem, func(a *Addr) { a.Host = long(1025) }), `connpool: Addr.Host is 1025 bytes long: use 1024 at most`},
		{changed(mem, func(a *Addr) { a.ServerName = long(1025) }), `connpool: Addr.ServerName is 1025 bytes long`},
		{changed(mem, func(a *Addr) { a.Host, a.ServerName, a.QoS = long(1024), long(1024), fullAddr.QoS }), ``},

		{changed(tcp, func(a *Addr) { a.Scope = long(1024) }), ``},
		{changed(tcp, func(a *Addr) { a.Scope = long(1025) }), `connpool: Addr.Scope is 1025 bytes long: use 1024 at most`},
		{changed(tcp, func(a *Addr) { a.QoS.DSCP = 63 }), ``},
		{changed(mem, func(a *Addr) { a.QoS.DSCP = 64 }), `connpool: Addr.QoS.DSCP is 64: use 0 to 63 (DSCP is the upper six bits of the TOS byte)`},
		{changed(tcp, func(a *Addr) { a.QoS.KeepAlive = 32767 * time.Second }), ``},
		{changed(tcp, func(a *Addr) { a.QoS.KeepAlive = 32768 * time.Second }), `Addr.QoS.KeepAlive is 9h6m8s: use whole seconds, up to 9h6m7s`},
		{changed(tcp, func(a *Addr) { a.QoS.KeepAlive = 1 }), `Addr.QoS.KeepAlive is 1ns: use whole seconds`},
		{changed(tcp, func(a *Addr) { a.QoS.UserTimeout = math.MaxInt32 * time.Millisecond }), ``},
		{changed(tcp, func(a *Addr) { a.QoS.UserTimeout = (math.MaxInt32 + 1) * time.Millisecond }), `Addr.QoS.UserTimeout is 596h31m23.648s: use whole milliseconds, 0 to 596h31m23.647s`},
		{changed(tcp, func(a *Addr) { a.QoS.UserTimeout = 1 }), `Addr.QoS.UserTimeout is 1ns`},
		{changed(tcp, func(a *Addr) { a.QoS.UserTimeout = -1 }), `Addr.QoS.UserTimeout is -1ns`},
		{changed(tcp, func(a *Addr) { a.QoS.SendBuffer = -1 }), `Addr.QoS.SendBuffer is -1: use 0 to 1073741823 bytes`},
		{changed(tcp, func(a *Addr) { a.QoS.SendBuffer = math.MaxInt32/2 + 1 }), `Addr.QoS.SendBuffer is 1073741824`},
		{changed(tcp, func(a *Addr) { a.QoS.RecvBuffer = -1 }), `Addr.QoS.RecvBuffer is -1`},
		{changed(tcp, func(a *Addr) { a.QoS.RecvBuffer = math.MaxInt32/2 + 1 }), `Addr.QoS.RecvBuffer is 1073741824`},
		{changed(tcp, func(a *Addr) { a.QoS.RecvBuffer = math.MaxInt32 / 2 }), ``},
	} {
		err := tc.addr.Validate()
		if tc.want == "" {
			assert.NoError(t, err)
			back, err := ParseAddr(tc.addr.String())
			assert.NoError(t, err)
			canon, _ := tc.addr.canonical()
			assert.Equal(t, canon, back)
			continue
		}
		if assert.Error(t, err, "%#v", tc.addr) {
			assert.Contains(t, err.Error(), tc.want)
			assert.ErrorIs(t, err, fs.ErrInvalid)
			assert.Equal(t, KindUsage, KindOf(err))
		}
		given, _ := tc.addr.canonical()
		assert.Equal(t, tc.addr, given, "the address is left as it was, for the error that shows it")
		assertRefused(t, tc.addr)
	}
}

// assertRefused checks that the text of an invalid Addr is readable and never
// that of another, valid one.
func assertRefused(t require.TestingT, a Addr) {
	text := a.String()
	require.NotEmpty(t, text)
	if a != (Addr{}) {
		requirePrintable(t, text)
	}
	_, err := ParseAddr(text)
	require.Error(t, err, text)
	require.NotEmpty(t, err.Error())
	if a != (Addr{}) {
		_, err = a.MarshalText()
		require.Error(t, err, text)
		b, err := a.AppendText([]byte("x"))
		require.Error(t, err, text)
		require.Equal(t, "x", string(b))
	}
}

func drawAddr(t *rapid.T) Addr {
	any := rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 12), func(b []byte) string { return string(b) })
	text := func(samples ...string) *rapid.Generator[string] {
		return rapid.OneOf(rapid.SampledFrom(samples), rapid.SampledFrom(samples), any)
	}
	a := Addr{
		Transport:  Transport(text("tcp", "tls", "unix", "mem", "a+b", "", "unix:", "tcp://").Draw(t, "transport")),
		Host:       text("db", "Db.example.", "127.0.0.1", "127.1", "::1", "FE80::1%Eth 0", "/run/x", "//x", "@x", "db:1", "[::1]", "").Draw(t, "host"),
		Port:       rapid.SampledFrom([]uint16{0, 1, 80, 65535}).Draw(t, "port"),
		ServerName: text("", "", "X.example", "::1").Draw(t, "server name"),
		Scope:      text("", "", "t7").Draw(t, "scope"),
	}
	if rapid.Bool().Draw(t, "qos") {
		a.QoS = QoS{
			DSCP:        rapid.SampledFrom([]uint8{0, 46, 63, 64, 255}).Draw(t, "dscp"),
			Delay:       rapid.Bool().Draw(t, "delay"),
			KeepAlive:   rapid.SampledFrom([]time.Duration{0, -1, math.MinInt64, time.Second, 32767 * time.Second, 1, math.MaxInt64}).Draw(t, "keepalive"),
			UserTimeout: rapid.SampledFrom([]time.Duration{0, time.Millisecond, time.Hour, -1, 1, math.MinInt64}).Draw(t, "user timeout"),
			SendBuffer:  rapid.SampledFrom([]int{0, 1, maxBuffer, -1, math.MinInt, math.MaxInt}).Draw(t, "send buffer"),
			RecvBuffer:  rapid.SampledFrom([]int{0, 1, maxBuffer, -1, math.MinInt, math.MaxInt}).Draw(t, "recv buffer"),
		}
	}
	return a
}

// BETA-X02
func TestTextOfAValidAddrIsItsInverseAndOfAnInvalidOneIsRefused(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		for range 20 {
			a := drawAddr(t)
			canon, err := a.canonical()
			if err != nil {
				assertRefused(t, a)
				continue
			}
			require.NoError(t, canon.Validate())
			twice, err := canon.canonical()
			require.NoError(t, err)
			require.Equal(t, canon, twice)
			require.Equal(t, canon.String(), a.String())
			requirePrintable(t, a.String())
			back, err := ParseAddr(a.String())
			require.NoError(t, err, a.String())
			require.Equal(t, canon, back, a.String())
		}
	})
}

func TestCompareIsATotalOrderThatAgreesWithEquality(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := drawAddr(t), drawAddr(t), drawAddr(t)
		require.Equal(t, a == b, a.Compare(b) == 0)
		require.Zero(t, a.Compare(a))
		require.Equal(t, a.Compare(b), -b.Compare(a))
		all := []Addr{a, b, c}
		slices.SortFunc(all, Addr.Compare)
		require.LessOrEqual(t, all[0].Compare(all[1]), 0)
		require.LessOrEqual(t, all[1].Compare(all[2]), 0)
		require.LessOrEqual(t, all[0].Compare(all[2]), 0)
	})
	base := fullAddr
	for _, later := range []Addr{
		changed(base, func(a *Addr) { a.Host = "e" }),
		changed(base, func(a *Addr) { a.Port, a.Scope = 5433, "" }),
		changed(base, func(a *Addr) { a.QoS.DSCP, a.QoS.Delay = 47, false }),
	} {
		assert.Equal(t, -1, base.Compare(later))
		assert.Equal(t, 1, later.Compare(base))
	}
	assert.Equal(t, 1, base.Compare(changed(base, func(a *Addr) { a.QoS.Delay = false })), "false before true")
}

// BETA-X02
func TestAddrTravelsAsJSON(t *testing.T) {
	type message struct {
		To    Addr
		Back  *Addr `json:",omitempty"`
		Zero  Addr
		Gone  Addr `json:",omitzero"`
		Loads map[Addr]int
	}
	odd := Addr{Transport: Unix, Host: "/a\xff<&>\"é"}
	in := message{To: fullAddr, Back: &odd, Loads: map[Addr]int{fullAddr: 1, odd: 2}}
	b, err := json.Marshal(in)
	require.NoError(t, err)
	var out message
	require.NoError(t, json.Unmarshal(b, &out))
	assert.Equal(t, in, out)
	assert.Contains(t, string(b), `"Zero":""`)
	assert.NotContains(t, string(b), `"Gone"`)

	out = message{To: odd}
	err = json.Unmarshal([]byte(`{"To": "tcp://db"}`), &out)
	require.ErrorIs(t, err, fs.ErrInvalid)
	assert.Equal(t, odd, out.To, "an error leaves the old value")
	require.NoError(t, json.Unmarshal([]byte(`{"To": ""}`), &out))
	assert.Zero(t, out.To)

	_, err = json.Marshal(message{To: Addr{Transport: TCP, Host: "db"}})
	assert.ErrorContains(t, err, "Addr.Port is not set")
}

func TestAddrIsAFlag(t *testing.T) {
	var a Addr
	set := flag.NewFlagSet("x", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.TextVar(&a, "addr", fullAddr, "peer")
	require.NoError(t, set.Parse(nil))
	assert.Equal(t, fullAddr, a)
	assert.Equal(t, fullAddr.String(), set.Lookup("addr").DefValue)
	require.NoError(t, set.Parse([]string{"-addr", "unix:/x"}))
	assert.Equal(t, Addr{Transport: Unix, Host: "/x"}, a)
	require.ErrorContains(t, set.Parse([]string{"-addr", "unix:"}), "Host is empty")
}

func TestTextIsAppendedToWhatIsThere(t *testing.T) {
	b, err := fullAddr.AppendText([]byte("to "))
	require.NoError(t, err)
	assert.Equal(t, "to "+fullAddr.String(), string(b))
	b, err = Addr{}.AppendText([]byte("to "))
	require.NoError(t, err)
	assert.Equal(t, "to ", string(b))
	b, err = Addr{}.MarshalText()
	require.NoError(t, err)
	assert.Equal(t, []byte{}, b)
}

// Each loan makes the canonical form of its address.
func TestCanonicalAddrCostsNoAllocation(t *testing.T) {
	for _, text := range []string{
		fullAddr.String(), "tcp://192.0.2.1:80", "tcp://[2001:db8::1]:80", "tcp://[fe80::1%25eth0]:80",
		"tcp://[::ffff:192.0.2.1]:80", "unix:/run/x.sock", "unix:@x", "mem://X.Y:1?server-name=Z",
	} {
		a := MustParseAddr(text)
		assert.Zero(t, patience.Allocs(100, func() {
			if c, err := a.canonical(); err != nil || c != a {
				panic(text)
			}
			if a.Validate() != nil || a.Compare(a) != 0 {
				panic(text)
			}
		}), text)
	}
}

// ORA-21: who puts credentials into an address gets a refusal that does not
// repeat them.
func TestCredentialsNeverReachAnError(t *testing.T) {
	for _, text := range []string{
		"tls://user:s3cret@db:5432", "tls://s3cret@db:5432", "tls://user:s3cret@db", "tls://user:1?s3cret@db:5432",
		"tls://user:s3cret@db:5432?dcsp=46", "tls://user:p%s3cret@db:1", "tls://user:[s3cret@db:1", "tls://u:1?scope=s3cret&x=@h",
		"user:s3cret@db:5432", "s3cret@db:5432", "s3cret:x@db:5432", "S3cret:s3cret@db", "tls:user:s3cret@db:1",
		"mem://user:s3cret@db:5432", "mem://s3cret@db:0", "mem://[s3cret@db",
	} {
		_, err := ParseAddr(text)
		if assert.Error(t, err, text) {
			assert.NotContains(t, strings.ToLower(err.Error()), "s3cret")
			assert.Contains(t, err.Error(), "xxxxx@")
		}
	}
	_, err := ParseAddr("tls://user:s3cret@db:5432")
	assert.EqualError(t, err, `connpool: ParseAddr("tls://xxxxx@db:5432"): host holds "@": credentials have no place in an address, give them in Config.Setup`)
	_, err = ParseAddr("mem://me@db:5432?x")
	assert.ErrorContains(t, err, `(at "x")`, "what follows them is shown")
	err = Addr{Transport: TLS, Host: "user:s3cret@db", Port: 1}.Validate()
	assert.EqualError(t, err, `connpool: Addr.Host holds "@": credentials have no place in an address, give them in Config.Setup`)

	_, err = ParseAddr("unix:@x?y")
	assert.ErrorContains(t, err, `ParseAddr("unix:@x?y")`, "an abstract name is none")
}

// ORA-21: Scope is not hidden, which is why it must not be the secret.
func TestScopeIsShownAsGiven(t *testing.T) {
	a := Addr{Transport: TCP, Host: "db", Port: 1, Scope: "tag-5f3a"}
	for _, text := range []string{a.String(), fmt.Sprintf("%v", a), fmt.Sprintf("%+v", a), fmt.Sprint(&a)} {
		assert.Equal(t, "tcp://db:1?scope=tag-5f3a", text)
	}
}

func TestTransportNamesAreChecked(t *testing.T) {
	for _, good := range []Transport{TCP, TLS, Unix, "a", "quic", "h2+tls", "x-y.z9"} {
		assert.NoError(t, good.validate())
	}
	for _, bad := range []Transport{"", "TCP", "9p", "+x", ".x", "-x", "a_b", "a:", "a/b", "ü"} {
		assert.ErrorContains(t, bad.validate(), fmt.Sprintf("%q is no transport: use tcp", string(bad)))
	}
}

func TestAddrErrorsUnwrapToTheFieldsOwn(t *testing.T) {
	_, err := ParseAddr("tcp://h:1?keepalive=1ms")
	var field *addrError
	require.True(t, errors.As(err, &field))
	assert.Equal(t, "QoS.KeepAlive", field.field)
}

// BETA-X02
func TestRandomAddressesSurviveTheirText(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	word := func(alphabet string, n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = alphabet[rng.IntN(len(alphabet))]
		}
		return string(b)
	}
	raw := make([]byte, 256)
	for i := range raw {
		raw[i] = byte(i)
	}
	seen := map[Addr]string{}
	texts := map[string]Addr{}
	for range 5000 {
		a := Addr{Scope: word(string(raw), rng.IntN(6))}
		switch rng.IntN(4) {
		case 0, 1:
			a.Transport = []Transport{TCP, TLS}[rng.IntN(2)]
			a.Host = []string{word("abcABC-_", 3) + "x", "10.0.0." + fmt.Sprint(rng.IntN(256)), "fe80::1%" + word("eth0/%?&", 1+rng.IntN(3)), "2001:DB8::" + word("0123456789abcdef", 2)}[rng.IntN(4)]
			a.Port = uint16(1 + rng.IntN(65535))
			if a.Transport == TLS && rng.IntN(2) == 0 {
				a.ServerName = word("abC.", 1) + "b.test"
			}
			a.QoS = QoS{DSCP: uint8(rng.IntN(64)), Delay: rng.IntN(2) == 0, KeepAlive: time.Duration(rng.IntN(5)-1) * time.Second, UserTimeout: time.Duration(rng.IntN(3)) * time.Millisecond}
		case 2:
			a.Transport, a.Host = Unix, "/"+word("ab/ ?&%#:é@", 1+rng.IntN(9))
			a.QoS = QoS{SendBuffer: rng.IntN(2) * 8192, RecvBuffer: rng.IntN(2) * 9000}
		case 3:
			a.Transport, a.Host, a.Port = "x25+b", word(string(raw), 1+rng.IntN(5)), uint16(rng.IntN(3))
		}
		canon, err := a.canonical()
		if err != nil {
			continue // it may have come out as no address at all
		}
		text := canon.String()
		back, err := ParseAddr(text)
		require.NoError(t, err, "%#v: %s", canon, text)
		require.Equal(t, canon, back)
		require.Equal(t, text, back.String())
		js, err := json.Marshal(canon)
		require.NoError(t, err)
		var fromJSON Addr
		require.NoError(t, json.Unmarshal(js, &fromJSON), "%s", js)
		require.Equal(t, canon, fromJSON)
		if other, twice := texts[text]; twice {
			require.Equal(t, other, canon, "two addresses, one text")
		}
		seen[canon], texts[text] = text, canon
	}
	require.Greater(t, len(seen), 2500)
	require.Len(t, texts, len(seen))
}
