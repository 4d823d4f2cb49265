package connpool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
)

// NetAddr is the Addr for a network and an address as [net.Dial] takes them: "tcp" with
// "host:port", "unix" with a path or, on Linux, "@name". An IPv6 address is in brackets
// and may have a zone. The port may be the name of a service, which the system's table of
// services turns into a number now, as in "localhost:http". The result is canonical; its
// other fields are unset. For TLS set its Transport, and for a name other than the host
// its ServerName.
//
// An Addr names one peer and no family of addresses. So an address without a host, as in
// ":80", is refused, which net.Dial takes for this machine. "tcp4" and "tcp6" are for IP
// addresses of that family, and a DNS name under one of the two is refused. Errors are
// [fs.ErrInvalid].
func NetAddr(network, address string) (Addr, error) {
	addr, err := parseNet(context.Background(), network, address, "")
	if err == nil {
		err = oneFamily(network, addr.Host)
	}
	if err != nil {
		return Addr{}, &netAddrError{network, address, err}
	}
	return addr, nil
}

// AddrOf is [NetAddr] for the network and the text of a, which is a *net.TCPAddr, a
// *net.UnixAddr or anything else that names a peer in the same way. It calls the two
// methods of a.
func AddrOf(a net.Addr) (Addr, error) {
	if isNil(a) {
		return Addr{}, &netAddrError{err: errors.New("the net.Addr is nil")}
	}
	return NetAddr(a.Network(), a.String())
}

// isNil reports whether v is nil, or a nil pointer in an interface.
func isNil(v any) bool {
	if v == nil {
		return true
	}
	r := reflect.ValueOf(v)
	return r.Kind() == reflect.Pointer && r.IsNil()
}

// HostPort is the address of a as [net.Dial] takes it, and [NetAddr] reads it: "host:port",
// with brackets around an IPv6 address, and the path or name of a Unix socket. Without a
// port it is the host. It leaves out all other fields of a.
func (a Addr) HostPort() string {
	if a.Transport == Unix || a.Port == 0 {
		return a.Host
	}
	return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port)))
}

// netAddrError is an error of NetAddr. It is fs.ErrInvalid.
type netAddrError struct {
	network, address string
	err              error
}

func (e *netAddrError) Unwrap() []error { return []error{e.err, fs.ErrInvalid} }

func (e *netAddrError) Error() string {
	// As in the error of ParseAddr: text before an '@' may be credentials.
	address := e.address
	if end := strings.LastIndexByte(address, '@'); end > 0 && e.network != "unix" {
		address = "xxxxx" + address[end:]
	}
	return fmt.Sprintf("connpool: NetAddr(%q, %q): %v", e.network, address, e.err)
}

// parseNet reads a network and an address of package net, and returns the canonical form.
// local takes the place of a host that is left out; "" refuses such an address. parseNet
// does not look at the family of "tcp4" and "tcp6", see oneFamily.
func parseNet(ctx context.Context, network, address, local string) (Addr, error) {
	switch network {
	case "unix":
		return Addr{Transport: Unix, Host: address}.canonical()
	case "tcp", "tcp4", "tcp6":
	default:
		return Addr{}, errors.New(`the network must be "tcp", "tcp4", "tcp6" or "unix"`)
	}
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		if wrong := (*net.AddrError)(nil); errors.As(err, &wrong) {
			err = errors.New(wrong.Err) // its text repeats the address
		}
		return Addr{}, err
	}
	if host == "" {
		host = local
	}
	if host == "" {
		return Addr{}, errors.New("the host is left out: name it, as in localhost:80")
	}
	port, err := strconv.Atoi(service)
	if err != nil {
		port, err = net.DefaultResolver.LookupPort(ctx, network, service)
		switch {
		case ctx.Err() != nil:
			return Addr{}, causeOf(ctx)
		case err != nil: // its text repeats the port
			return Addr{}, errors.New("the port is no number, and no service that this system knows")
		}
	}
	if port < 1 || port > 65535 {
		return Addr{}, errors.New("the port must be from 1 to 65535")
	}
	return Addr{Transport: TCP, Host: host, Port: uint16(port)}.canonical()
}

// oneFamily returns an error if network asks for one family of addresses, and host is no
// IP address of that family.
func oneFamily(network, host string) error {
	if network != "tcp4" && network != "tcp6" {
		return nil
	}
	ip, err := netip.ParseAddr(host)
	if err == nil && (ip.Is4() || ip.Is4In6()) == (network == "tcp4") {
		return nil
	}
	return fmt.Errorf("an Addr cannot say %s: give an IP address of that family, or use network tcp", network)
}
