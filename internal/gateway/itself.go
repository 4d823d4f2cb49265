package gateway

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// notItself refuses a server that is the gateway itself, which would connect to itself
// until no descriptor is left. It sees through the spellings of an address: names,
// wildcards, IPv4 in IPv6, and different paths to one file. It looks names up, for two
// seconds at most; a name without an address counts as another host. at is where clients
// connect.
func (p *plan) notItself(ctx context.Context, at endpoint) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if reaches(ctx, p.to, at) {
		return fmt.Errorf("-to is %s and -listen is %v, which are the same address: the gateway would be its own client", p.To, at)
	}
	if p.StatusListen != "" && reaches(ctx, p.to, p.status) {
		return fmt.Errorf("-to is %s and -status is %v, which are the same address", p.To, p.status)
	}
	return nil
}

// reaches reports whether dialing to leads to e.
func reaches(ctx context.Context, to connpool.Addr, e endpoint) bool {
	if (to.Transport == connpool.Unix) != (e.network == "unix") {
		return false
	}
	if e.network == "unix" {
		return sameFile(to.Host, e.address)
	}
	host, port, err := net.SplitHostPort(e.address)
	if err != nil {
		return false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil { // a service name, such as http
		p, err := net.DefaultResolver.LookupPort(ctx, "tcp", port)
		if err != nil {
			return false
		}
		n = uint64(p)
	}
	if uint16(n) != to.Port || n == 0 {
		return false
	}
	if strings.EqualFold(host, to.Host) {
		return true
	}
	theirs := addressesOf(ctx, to.Host)
	if host == "" {
		return anyIsOurs(theirs)
	}
	for _, ours := range addressesOf(ctx, host) {
		if ours.IsUnspecified() && anyIsOurs(theirs) {
			return true
		}
		for _, a := range theirs {
			// Dialing the wildcard address dials loopback.
			if a == ours || a.IsUnspecified() && ours.IsLoopback() {
				return true
			}
		}
	}
	return false
}

// addressesOf returns the addresses of a host, without zones and with IPv4-in-IPv6 as
// IPv4.
func addressesOf(ctx context.Context, host string) (all []netip.Addr) {
	plain := func(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{plain(a)}
	}
	if strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") {
		all = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	}
	found, _ := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	for _, a := range found {
		all = append(all, plain(a))
	}
	return all
}

// anyIsOurs reports whether one of the addresses belongs to this machine.
func anyIsOurs(all []netip.Addr) bool {
	interfaces, _ := net.InterfaceAddrs()
	for _, a := range all {
		if a.IsLoopback() || a.IsUnspecified() {
			return true
		}
		for _, i := range interfaces {
			if prefix, err := netip.ParsePrefix(i.String()); err == nil && prefix.Addr().Unmap().WithZone("") == a {
				return true
			}
		}
	}
	return false
}

// sameFile reports whether two paths lead to one socket, whether or not the socket exists
// yet.
func sameFile(a, b string) bool {
	if strings.HasPrefix(a, "@") || strings.HasPrefix(b, "@") {
		return a == b
	}
	if x, err := os.Stat(a); err == nil {
		if y, err := os.Stat(b); err == nil {
			return os.SameFile(x, y)
		}
	}
	whole := func(path string) string {
		path, err := filepath.Abs(path)
		if err != nil {
			return path
		}
		if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
			return filepath.Join(dir, filepath.Base(path))
		}
		return path
	}
	return whole(a) == whole(b)
}
