package connpool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func getsockopt(t *testing.T, nc net.Conn, level, option int) int {
	t.Helper()
	raw, err := nc.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	var v int
	var opterr error
	require.NoError(t, raw.Control(func(fd uintptr) { v, opterr = unix.GetsockoptInt(int(fd), level, option) }))
	require.NoError(t, opterr)
	return v
}

func listenUnix(t *testing.T) net.Listener {
	dir, err := os.MkdirTemp("", "cp") // t.TempDir may be too long for a socket
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return listenOn(t, "unix", dir+"/s")
}

// BETA-11: getsockopt on the connection shows each field of its QoS, and that
// the other fields are left alone.
func TestEveryQoSFieldIsSetOnTheSocket(t *testing.T) {
	type option struct {
		name          string
		level, option int
		shift         int
	}
	var (
		tos      = option{"IP_TOS", unix.IPPROTO_IP, unix.IP_TOS, 2}
		tclass   = option{"IPV6_TCLASS", unix.IPPROTO_IPV6, unix.IPV6_TCLASS, 2}
		nodelay  = option{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 0}
		ka       = option{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0}
		idle     = option{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 0}
		interval = option{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 0}
		timeout  = option{"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 0}
		sndbuf   = option{"SO_SNDBUF", unix.SOL_SOCKET, unix.SO_SNDBUF, 1}
		rcvbuf   = option{"SO_RCVBUF", unix.SOL_SOCKET, unix.SO_RCVBUF, 1}
	)
	tcpOptions := []option{nodelay, ka, idle, interval, timeout, sndbuf, rcvbuf}
	families := []struct {
		name    string
		addr    func(t *testing.T) Addr
		dscp    option
		options []option
		fields  string
	}{
		{"IPv4", func(t *testing.T) Addr { return tcpAddrOf(listenOn(t, "tcp4", "127.0.0.1:0")) }, tos, append(tcpOptions, tos), "all"},
		{"IPv4 in IPv6", func(t *testing.T) Addr {
			a := tcpAddrOf(listenOn(t, "tcp4", "127.0.0.1:0"))
			a.Host = "::ffff:127.0.0.1"
			return a
		}, tos, append(tcpOptions, tos), "all"},
		{"IPv6", func(t *testing.T) Addr { return tcpAddrOf(listenOn(t, "tcp6", "[::1]:0")) }, tclass, append(tcpOptions, tclass), "all"},
		{"TLS", func(t *testing.T) Addr {
			a := tcpAddrOf(listenOn(t, "tcp4", "127.0.0.1:0"))
			a.Transport = TLS
			return a
		}, tos, append(tcpOptions, tos), "all"},
		{"Unix", func(t *testing.T) Addr { return Addr{Transport: Unix, Host: listenUnix(t).Addr().String()} }, option{}, []option{sndbuf, rcvbuf}, "SendBuffer RecvBuffer"},
	}
	for _, family := range families {
		t.Run(family.name, func(t *testing.T) {
			addr := family.addr(t)
			read := func(q QoS) map[string]int {
				addr := addr
				addr.QoS = q
				nc := dialed(t, addr)
				values := map[string]int{}
				for _, o := range family.options {
					values[o.name] = getsockopt(t, nc, o.level, o.option) >> o.shift
				}
				return values
			}
			plain := read(QoS{})
			if addr.Transport != Unix {
				assert.Equal(t, []int{1, 1, 15, 15, 0, 0}, []int{plain["TCP_NODELAY"], plain["SO_KEEPALIVE"], plain["TCP_KEEPIDLE"],
					plain["TCP_KEEPINTVL"], plain["TCP_USER_TIMEOUT"], plain[family.dscp.name]}, "as the zero QoS promises")
			}
			expect := map[string]map[string]int{
				"DSCP":        {family.dscp.name: 46},
				"Delay":       {"TCP_NODELAY": 0},
				"KeepAlive":   {"TCP_KEEPIDLE": 7, "TCP_KEEPINTVL": 7},
				"UserTimeout": {"TCP_USER_TIMEOUT": 1234},
				"SendBuffer":  {"SO_SNDBUF": 40000},
				"RecvBuffer":  {"SO_RCVBUF": 50000},
			}
			for _, field := range qosFields("") {
				if family.fields != "all" && !strings.Contains(family.fields, field) {
					continue
				}
				want, ok := expect[field]
				require.True(t, ok, "%s needs an entry in expect", field)
				got := read(qosOf[field])
				for name, before := range plain {
					v, changed := want[name]
					switch {
					case changed:
						assert.Equal(t, v, got[name], "%s of %s", name, field)
					case name != "SO_RCVBUF" && name != "SO_SNDBUF": // the kernel sizes these as it goes
						assert.Equal(t, before, got[name], "%s, though only %s is set", name, field)
					}
				}
			}
			if addr.Transport != Unix {
				assert.Zero(t, read(QoS{KeepAlive: -1})["SO_KEEPALIVE"])
			}
		})
	}
}

// A host name may have addresses of both families; each socket that is tried
// gets the option of its own.
func TestQoSReachesTheSocketOfANamedHost(t *testing.T) {
	ln := listenOn(t, "tcp4", "127.0.0.1:0")
	addr := tcpAddrOf(ln)
	addr.Host, addr.QoS = "localhost", qosOf["DSCP"]
	nc := dialed(t, addr)
	assert.Equal(t, 46<<2, getsockopt(t, nc, unix.IPPROTO_IP, unix.IP_TOS)&^3)
}

func TestAbstractSocketsAreDialed(t *testing.T) {
	name := fmt.Sprintf("@connpool-%d-%d", os.Getpid(), time.Now().UnixNano())
	listenOn(t, "unix", name)
	nc := dialed(t, Addr{Transport: Unix, Host: name, QoS: qosOf["SendBuffer"]})
	assert.Equal(t, name, nc.RemoteAddr().String())
	assert.Equal(t, 80000, getsockopt(t, nc, unix.SOL_SOCKET, unix.SO_SNDBUF))
}

// syn is what matters here of a connection's first packet.
type syn struct {
	dscp   int
	wscale int // -1: not offered
}

// captureSYN dials addr and returns the SYN as it went over the loopback.
func captureSYN(t *testing.T, addr Addr) syn {
	t.Helper()
	proto := uint16(unix.ETH_P_IP)
	if strings.Contains(addr.Host, ":") {
		proto = unix.ETH_P_IPV6
	}
	proto = binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, proto))
	lo, err := net.InterfaceByName("lo")
	require.NoError(t, err)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(proto))
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		t.Skip("reading packets off the loopback needs CAP_NET_RAW: run as root")
	}
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: lo.Index}))
	require.NoError(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}))

	// All that passes the loopback of a busy machine comes here, and the buffer may overflow.
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
	packet := make([]byte, 256)
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		from := dialed(t, addr).LocalAddr().(*net.TCPAddr).Port
		for again := time.Now().Add(time.Second); time.Now().Before(again); {
			n, _, err := unix.Recvfrom(fd, packet, 0)
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOBUFS) {
				continue
			}
			require.NoError(t, err)
			if s, ok := parseSYN(packet[:min(n, len(packet))], from); ok {
				return s
			}
		}
	}
	require.Fail(t, "the SYN did not pass the loopback within a minute")
	return syn{}
}

func parseSYN(ip []byte, from int) (s syn, ok bool) {
	var tcp []byte
	switch {
	case len(ip) >= 20 && ip[0]>>4 == 4 && ip[9] == unix.IPPROTO_TCP:
		s.dscp, tcp = int(ip[1]>>2), ip[min(len(ip), int(ip[0]&15)*4):]
	case len(ip) >= 40 && ip[0]>>4 == 6 && ip[6] == unix.IPPROTO_TCP:
		s.dscp, tcp = int(binary.BigEndian.Uint16(ip)>>6&63), ip[40:]
	}
	if len(tcp) < 20 || int(binary.BigEndian.Uint16(tcp)) != from || tcp[13]&0x12 != 0x02 { // SYN without ACK
		return s, false
	}
	s.wscale = -1
	for o := tcp[20:min(len(tcp), int(tcp[12]>>4)*4)]; len(o) > 0 && o[0] != 0; {
		switch {
		case o[0] == 1: // padding
			o = o[1:]
		case len(o) < 2 || o[1] < 2 || int(o[1]) > len(o):
			return s, false
		default:
			if o[0] == 3 && o[1] == 3 {
				s.wscale = int(o[2])
			}
			o = o[o[1]:]
		}
	}
	return s, true
}

// BETA-11
func TestQoSHoldsFromTheFirstPacketOn(t *testing.T) {
	for network, address := range map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"} {
		t.Run(network, func(t *testing.T) {
			addr := tcpAddrOf(listenOn(t, network, address))
			plain := captureSYN(t, addr)
			assert.Zero(t, plain.dscp)
			for _, dscp := range []uint8{1, 46, 63} {
				addr.QoS = QoS{DSCP: dscp}
				assert.Equal(t, syn{int(dscp), plain.wscale}, captureSYN(t, addr))
			}
			// The scale of the window that can ever be offered goes out with
			// the SYN; a buffer set later would come too late for it.
			addr.QoS = QoS{RecvBuffer: 16 << 10}
			assert.Equal(t, syn{0, 0}, captureSYN(t, addr))
			assert.Positive(t, plain.wscale)
		})
	}
}

func kernelLimit(t *testing.T, name string) int {
	b, err := os.ReadFile("/proc/sys/net/core/" + name)
	if err != nil {
		t.Skipf("the kernel does not tell its limit: %v", err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	require.NoError(t, err)
	if n >= maxBuffer {
		t.Skipf("net.core.%s is beyond any buffer", name)
	}
	return n
}

// withoutNetAdmin runs f on a thread that lacks CAP_NET_ADMIN and ends with it.
func withoutNetAdmin(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with the goroutine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		err := unix.Capget(&header, &data[0])
		data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err == nil {
			err = unix.Capset(&header, &data[0])
		}
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

// The kernel cuts such a size down and reports success.
func TestBufferBeyondTheKernelsLimitFailsTheDial(t *testing.T) {
	for _, tc := range []struct {
		limit, field string
		option       int
		qos          func(n int) QoS
	}{
		{"wmem_max", "SendBuffer", unix.SO_SNDBUF, func(n int) QoS { return QoS{SendBuffer: n} }},
		{"rmem_max", "RecvBuffer", unix.SO_RCVBUF, func(n int) QoS { return QoS{RecvBuffer: n} }},
	} {
		t.Run(tc.field, func(t *testing.T) {
			limit := kernelLimit(t, tc.limit)
			for _, addr := range []Addr{
				tcpAddrOf(listenOn(t, "tcp4", "127.0.0.1:0")),
				{Transport: Unix, Host: listenUnix(t).Addr().String()},
			} {
				addr.QoS = tc.qos(limit + 1)
				err := withoutNetAdmin(func() error {
					nc, err := dialSocket(t.Context(), addr)
					if err == nil {
						nc.Close()
					}
					return err
				})
				assert.ErrorContains(t, err, fmt.Sprintf("QoS.%s: %d bytes asked for, %d granted: raise sysctl net.core.%s, or ask for less",
					tc.field, limit+1, limit, tc.limit))

				addr.QoS = tc.qos(limit)
				nc := dialed(t, addr)
				assert.Equal(t, 2*limit, getsockopt(t, nc, unix.SOL_SOCKET, tc.option))

				addr.QoS = tc.qos(1)
				nc = dialed(t, addr)
				assert.Greater(t, getsockopt(t, nc, unix.SOL_SOCKET, tc.option), 2, "the kernel's minimum")
			}
		})
	}
}

func TestBufferBeyondTheKernelsLimitIsForcedWhereItMayBe(t *testing.T) {
	addr := tcpAddrOf(listenOn(t, "tcp4", "127.0.0.1:0"))
	n := max(kernelLimit(t, "wmem_max"), kernelLimit(t, "rmem_max")) + 1
	var header = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	require.NoError(t, unix.Capget(&header, &data[0]))
	if data[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		t.Skip("needs CAP_NET_ADMIN: run as root")
	}
	addr.QoS = QoS{SendBuffer: n, RecvBuffer: n}
	nc := dialed(t, addr)
	assert.Equal(t, 2*n, getsockopt(t, nc, unix.SOL_SOCKET, unix.SO_SNDBUF))
	assert.Equal(t, 2*n, getsockopt(t, nc, unix.SOL_SOCKET, unix.SO_RCVBUF))
}

// A connection that lacks part of its QoS must not be lent, nor left open.
func TestConnectionThatCannotGetItsQoSIsClosed(t *testing.T) {
	ln := listenOn(t, "tcp4", "127.0.0.1:0")
	addr := tcpAddrOf(ln)
	addr.QoS.KeepAlive = 40000 * time.Second // more than Linux takes; Validate would say so
	require.Error(t, addr.Validate())
	_, err := dialSocket(t.Context(), addr)
	assert.ErrorContains(t, err, "QoS.KeepAlive: ")
	assert.ErrorIs(t, err, unix.EINVAL)

	server, err := ln.Accept()
	require.NoError(t, err)
	defer server.Close()
	require.NoError(t, server.SetReadDeadline(time.Now().Add(10*time.Second)))
	_, err = server.Read(make([]byte, 1))
	assert.ErrorIs(t, err, io.EOF)
}

// fdRawConn is a RawConn over any descriptor.
type fdRawConn uintptr

func (c fdRawConn) Control(f func(uintptr)) error { f(uintptr(c)); return nil }
func (fdRawConn) Read(func(uintptr) bool) error   { panic("not for Control") }
func (fdRawConn) Write(func(uintptr) bool) error  { panic("not for Control") }

func TestControlNamesTheFieldThatFailed(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	defer w.Close()
	for _, field := range []string{"DSCP", "UserTimeout", "SendBuffer", "RecvBuffer"} {
		for _, network := range []string{"tcp4", "tcp6"} {
			err := qosOf[field].Control(network, "", fdRawConn(r.Fd()))
			assert.ErrorIs(t, err, unix.ENOTSOCK, field)
			assert.ErrorContains(t, err, "QoS."+field+": ")
		}
	}
}

func TestControlRefusesAFieldThatTheNetworkLacks(t *testing.T) {
	ln := listenUnix(t)
	for _, field := range []string{"DSCP", "UserTimeout"} {
		d := net.Dialer{Control: qosOf[field].Control}
		_, err := d.DialContext(t.Context(), "unix", ln.Addr().String())
		assert.ErrorIs(t, err, errors.ErrUnsupported)
		assert.ErrorContains(t, err, "QoS."+field+`: network "unix" is n`)
	}
}

// BETA-11: a dialer in Config.Dialers has the same means as the pool.
func TestControlFitsADialerOfOnesOwn(t *testing.T) {
	addr := tcpAddrOf(listenOn(t, "tcp4", "127.0.0.1:0"))
	addr.QoS = fullAddr.QoS
	d := net.Dialer{Control: addr.QoS.Control}
	nc, err := d.DialContext(t.Context(), "tcp", net.JoinHostPort(addr.Host, strconv.Itoa(int(addr.Port))))
	require.NoError(t, err)
	defer nc.Close()
	assert.Equal(t, 46<<2, getsockopt(t, nc, unix.IPPROTO_IP, unix.IP_TOS)&^3)
	assert.Equal(t, 1500, getsockopt(t, nc, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT))
	assert.Equal(t, 2*65536, getsockopt(t, nc, unix.SOL_SOCKET, unix.SO_SNDBUF))
	assert.Equal(t, 2*32768, getsockopt(t, nc, unix.SOL_SOCKET, unix.SO_RCVBUF))
}
