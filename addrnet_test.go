package connpool

import (
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// ADO-04: an Addr from what package net calls an address.
func TestNetAddrReadsTheFormsOfPackageNet(t *testing.T) {
	for _, c := range []struct {
		network, address string
		want             Addr
	}{
		{"tcp", "db.example:5432", Addr{Transport: TCP, Host: "db.example", Port: 5432}},
		{"tcp", "DB.Example.:5432", Addr{Transport: TCP, Host: "db.example", Port: 5432}},
		{"tcp", "10.0.0.1:80", Addr{Transport: TCP, Host: "10.0.0.1", Port: 80}},
		{"tcp4", "10.0.0.1:80", Addr{Transport: TCP, Host: "10.0.0.1", Port: 80}},
		{"tcp4", "[::ffff:10.0.0.1]:80", Addr{Transport: TCP, Host: "::ffff:10.0.0.1", Port: 80}},
		{"tcp", "[::1]:80", Addr{Transport: TCP, Host: "::1", Port: 80}},
		{"tcp6", "[::1]:80", Addr{Transport: TCP, Host: "::1", Port: 80}},
		{"tcp6", "[FE80::1%eth0]:502", Addr{Transport: TCP, Host: "fe80::1%eth0", Port: 502}},
		{"tcp", "localhost:http", Addr{Transport: TCP, Host: "localhost", Port: 80}},
		{"tcp6", "[::1]:https", Addr{Transport: TCP, Host: "::1", Port: 443}},
		{"unix", "/run/x.sock", Addr{Transport: Unix, Host: "/run/x.sock"}},
		{"unix", "x:80", Addr{Transport: Unix, Host: "x:80"}},
		{"unix", "@name", Addr{Transport: Unix, Host: "@name"}},
		{"unix", "./@name", Addr{Transport: Unix, Host: "./@name"}},
	} {
		got, err := NetAddr(c.network, c.address)
		require.NoError(t, err, c.address)
		require.Equal(t, c.want, got)
		require.NoError(t, got.Validate())
		again, err := NetAddr(string(got.Transport), got.HostPort())
		require.NoError(t, err, "HostPort is %s", got.HostPort())
		require.Equal(t, got, again)
	}
}

// ADO-04: what the pool could not dial, or would dial otherwise than package net, is
// refused in words.
func TestNetAddrRefusesInWords(t *testing.T) {
	for _, c := range []struct{ network, address, want string }{
		{"tcp", ":80", `connpool: NetAddr("tcp", ":80"): the host is left out: name it, as in localhost:80`},
		{"tcp6", ":80", "the host is left out"},
		{"tcp", "db.example", "missing port in address"},
		{"tcp", "::1:80", "too many colons in address"},
		{"tcp", "[::1]", "missing port in address"},
		{"tcp", "db.example:", "the port must be from 1 to 65535"},
		{"tcp", "db.example:0", "the port must be from 1 to 65535"},
		{"tcp", "db.example:65536", "the port must be from 1 to 65535"},
		{"tcp", "db.example:-1", "the port must be from 1 to 65535"},
		{"tcp", "db.example:no-such-service", "the port is no number, and no service that this system knows"},
		{"tcp", "db_example!:80", "holds '!'"},
		{"tcp", "127.1:80", "looks like an IPv4 address but is not"},
		{"tcp", "[fe80::1%]:80", "has an empty zone"},
		{"tcp4", "[::1]:80", "an Addr cannot say tcp4: give an IP address of that family, or use network tcp"},
		{"tcp4", "[fe80::1%eth0]:80", "an Addr cannot say tcp4"},
		{"tcp4", "db.example:80", "an Addr cannot say tcp4"},
		{"tcp6", "10.0.0.1:80", "an Addr cannot say tcp6"},
		{"tcp6", "[::ffff:10.0.0.1]:80", "an Addr cannot say tcp6"},
		{"unix", "", `is empty: give the path of the socket`},
		{"unix", "@", `is empty: give the path of the socket`},
		{"unix", "/run/\x00", "holds a NUL byte"},
		{"unix", "/" + strings.Repeat("x", 107), "use 107 at most"},
		{"udp", "10.0.0.1:53", `the network must be "tcp", "tcp4", "tcp6" or "unix"`},
		{"unixgram", "/run/x.sock", "the network must be"},
		{"tls", "db.example:5432", "the network must be"},
		{"", "", "the network must be"},
		{"tcp", "tom:secret@db.example:5432", `NetAddr("tcp", "xxxxx@db.example:5432"): too many colons in address`},
		{"tcp", "tom:secret@db.example", `NetAddr("tcp", "xxxxx@db.example"): the port is no number`},
		{"tcp", "secret@db.example:5432", `NetAddr("tcp", "xxxxx@db.example:5432"): connpool: Addr.Host holds "@"`},
	} {
		got, err := NetAddr(c.network, c.address)
		require.ErrorContains(t, err, c.want, "%q %q", c.network, c.address)
		require.ErrorIs(t, err, fs.ErrInvalid)
		require.NotContains(t, err.Error(), "secret")
		require.NotContains(t, err.Error(), "\n")
		require.Zero(t, got)
	}
}

// ADO-04: a net.Addr that a connection or a listener has is an Addr that dials to it.
func TestAddrOfIsWhereTheOtherEndListens(t *testing.T) {
	p, err := New(Config{})
	require.NoError(t, err)
	defer p.Close()
	dir, err := os.MkdirTemp("", "cp") // t.TempDir may be too long for a socket
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	for network, listen := range map[string]string{"tcp": "127.0.0.1:0", "unix": dir + "/s"} {
		l, err := net.Listen(network, listen)
		require.NoError(t, err)
		defer l.Close()
		addr, err := AddrOf(l.Addr())
		require.NoError(t, err)
		require.NoError(t, p.With(bg, addr, func(c Conn) error {
			again, err := AddrOf(c.RemoteAddr())
			require.NoError(t, err)
			require.Equal(t, addr, again)
			require.Equal(t, l.Addr().String(), addr.HostPort())
			return nil
		}))
	}
	zoned, err := AddrOf(net.TCPAddrFromAddrPort(netip.MustParseAddrPort("[fe80::1%eth0]:502")))
	require.NoError(t, err)
	require.Equal(t, MustParseAddr("tcp://[fe80::1%25eth0]:502"), zoned)
	abstract, err := AddrOf(&net.UnixAddr{Name: "@x", Net: "unix"})
	require.NoError(t, err)
	require.Equal(t, MustParseAddr("unix:@x"), abstract)

	for _, a := range []net.Addr{
		nil, (*net.TCPAddr)(nil), (*net.UnixAddr)(nil), &net.TCPAddr{Port: 80}, &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1)},
		&net.UnixAddr{Net: "unix"}, &net.UnixAddr{Name: "/x", Net: "unixgram"}, &net.UDPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 53},
	} {
		got, err := AddrOf(a)
		require.ErrorIs(t, err, fs.ErrInvalid, "%T %v", a, a)
		require.Zero(t, got)
	}
}

// ADO-04
func TestHostPortIsWhatADialerOfOnesOwnNeeds(t *testing.T) {
	for text, want := range map[string]string{
		"tls://db.example:5432?server-name=x&scope=t7": "db.example:5432",
		"tcp://[fe80::1%25eth0]:502":                   "[fe80::1%eth0]:502",
		"unix:/run/x.sock":                             "/run/x.sock",
		"unix:@x":                                      "@x",
		"serial://ttyS0":                               "ttyS0",
		"quic://db.example:443":                        "db.example:443",
	} {
		require.Equal(t, want, MustParseAddr(text).HostPort())
	}
	require.Zero(t, Addr{}.HostPort())
}

// One function reads an address of package net, for NetAddr and for DialContext. Only
// DialContext can say a family, and takes an address without a host for this machine.
func TestDialContextReadsWhatNetAddrReads(t *testing.T) {
	own := (&testnet{}).dial
	for _, c := range []struct{ network, address string }{{"tcp", ":80"}, {"tcp4", "localhost:80"}} {
		got, err := trackedAddr(bg, c.network, c.address, nil)
		require.NoError(t, err)
		require.Equal(t, MustParseAddr("tcp://localhost:80"), got)
		_, err = NetAddr(c.network, c.address)
		require.Error(t, err)
	}
	_, err := trackedAddr(bg, "tcp4", "localhost:80", own)
	require.ErrorContains(t, err, `Config.Dialers["tcp"] cannot be told to dial tcp4: use network tcp`)
	zoned, err := trackedAddr(bg, "tcp6", "[fe80::1%eth0]:80", own)
	require.NoError(t, err)
	require.Equal(t, "fe80::1%eth0", zoned.Host)
	_, err = trackedAddr(bg, "udp", "localhost:80", nil)
	require.ErrorContains(t, err, "dial udp localhost:80: the network must be")
	var usage *Error
	require.True(t, errors.As(err, &usage) && usage.Stage == StageUsage)
}
