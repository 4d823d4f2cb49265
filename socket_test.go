package connpool

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"reflect"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// listenOn opens a listener that lives as long as the test. The kernel completes
// the connections to it by itself.
func listenOn(t *testing.T, network, address string) net.Listener {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil && network == "tcp6" {
		t.Skipf("this machine has no IPv6: %v", err)
	}
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

func tcpAddrOf(ln net.Listener) Addr {
	ta := ln.Addr().(*net.TCPAddr)
	return Addr{Transport: TCP, Host: ta.IP.String(), Port: uint16(ta.Port)}
}

// dialed opens a connection that lives as long as the test.
func dialed(t *testing.T, addr Addr) net.Conn {
	t.Helper()
	addr, err := addr.canonical()
	require.NoError(t, err)
	nc, err := dialSocket(t.Context(), addr)
	require.NoError(t, err)
	t.Cleanup(func() { nc.Close() })
	return nc
}

// qosOf has, for each field of QoS, the QoS that sets this one alone.
var qosOf = map[string]QoS{
	"DSCP":        {DSCP: 46},
	"Delay":       {Delay: true},
	"KeepAlive":   {KeepAlive: 7 * time.Second},
	"UserTimeout": {UserTimeout: 1234 * time.Millisecond},
	"SendBuffer":  {SendBuffer: 40000},
	"RecvBuffer":  {RecvBuffer: 50000},
}

func TestAbstractUnixSocketsAreRefusedWhereThereAreNone(t *testing.T) {
	_, _, err := target(Addr{Transport: Unix, Host: "@x"}, false)
	assert.ErrorIs(t, err, errors.ErrUnsupported)
	assert.ErrorContains(t, err, "has no abstract Unix sockets: give a path in Host")
	network, address, err := target(Addr{Transport: Unix, Host: "./@x"}, false)
	require.NoError(t, err)
	assert.Equal(t, []string{"unix", "./@x"}, []string{network, address})
}

// Every field of QoS has an entry in qosOf, which sets no other.
func TestQoSOfSetsEachFieldAlone(t *testing.T) {
	for _, field := range qosFields("") {
		q, ok := qosOf[field]
		require.True(t, ok, "%s needs an entry in qosOf", field)
		require.False(t, reflect.ValueOf(q).FieldByName(field).IsZero())
	}
}

func TestTCPAndTLSAddrsAreTCPSockets(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"tcp://db:5432", "db:5432"},
		{"tls://db:5432?server-name=x", "db:5432"},
		{"tcp://[fe80::1%25eth0]:502", "[fe80::1%eth0]:502"},
	} {
		network, address, err := target(MustParseAddr(tc.text), false)
		require.NoError(t, err)
		assert.Equal(t, []string{"tcp", tc.want}, []string{network, address})
	}
}

func TestTransportWithoutADialerIsTheCallersMistake(t *testing.T) {
	_, err := dialSocket(t.Context(), Addr{Transport: "quic", Host: "h", Port: 1})
	assert.ErrorContains(t, err, `nobody dials transport "quic": add it to Config.Dialers`)
	assert.ErrorIs(t, err, fs.ErrInvalid)
}

func TestDialEndsWithItsContext(t *testing.T) {
	ln := listenOn(t, "tcp4", "127.0.0.1:0")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := dialSocket(ctx, tcpAddrOf(ln))
	assert.ErrorIs(t, err, context.Canceled)
}

func TestRefusedDialKeepsItsCause(t *testing.T) {
	ln := listenOn(t, "tcp4", "127.0.0.1:0")
	addr := tcpAddrOf(ln)
	ln.Close()
	_, err := dialSocket(t.Context(), addr)
	assert.Equal(t, KindRefused, KindOf(err), "%v", err)
}

// countingRawConn is a socket of which Control can be seen to be called.
type countingRawConn struct {
	calls int
	err   error
}

func (c *countingRawConn) Control(func(uintptr)) error    { c.calls++; return c.err }
func (c *countingRawConn) Read(func(uintptr) bool) error  { panic("not for Control") }
func (c *countingRawConn) Write(func(uintptr) bool) error { panic("not for Control") }

var _ syscall.RawConn = (*countingRawConn)(nil)

func TestControlTouchesNoSocketInVain(t *testing.T) {
	for _, q := range []QoS{{}, {Delay: true, KeepAlive: time.Second}} {
		var c countingRawConn
		assert.NoError(t, q.Control("tcp4", "127.0.0.1:1", &c))
		assert.Zero(t, c.calls)
	}
	var c countingRawConn
	err := QoS{DSCP: 64}.Control("tcp4", "127.0.0.1:1", &c)
	assert.ErrorContains(t, err, "QoS.DSCP is 64: use 0 to 63")
	assert.ErrorIs(t, err, fs.ErrInvalid)
	assert.Zero(t, c.calls)
}

func TestControlReportsASocketThatIsGone(t *testing.T) {
	c := countingRawConn{err: net.ErrClosed}
	assert.ErrorIs(t, QoS{SendBuffer: 4096}.Control("tcp4", "127.0.0.1:1", &c), net.ErrClosed)
	assert.Equal(t, 1, c.calls)
}
