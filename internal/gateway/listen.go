package gateway

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// endpoint is an address to listen on.
type endpoint struct {
	network string // tcp or unix
	address string // as package net takes it
	tls     bool
}

func (e endpoint) String() string {
	switch {
	case e.network == "unix":
		return "unix:" + e.address
	case e.tls:
		return "tls://" + e.address
	}
	return "tcp://" + e.address
}

// parseEndpoint reads tcp://host:port, tls://host:port and unix:/path. Without a scheme
// it means TCP. An empty host means every interface, port 0 any free port.
func parseEndpoint(s string) (endpoint, error) {
	if s == "" {
		return endpoint{}, errors.New("it is missing: use tcp://127.0.0.1:6380, tls://host:port or unix:/path to a socket")
	}
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if rest, ok := strings.CutPrefix(path, "//"); ok {
			path = rest
		}
		switch {
		case path == "" || path == "@":
			return endpoint{}, fmt.Errorf("%q has no path: use unix:/run/gateway.sock", s)
		case len(path) > 107:
			return endpoint{}, fmt.Errorf("%q has a path of %d bytes: use 107 at most", s, len(path))
		}
		return endpoint{network: "unix", address: path}, nil
	}
	e := endpoint{network: "tcp", address: s}
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		if scheme != "tcp" && scheme != "tls" {
			return endpoint{}, fmt.Errorf("%q begins with %s: use tcp, tls or unix", s, scheme)
		}
		e.tls, e.address = scheme == "tls", rest
	}
	host, port, err := net.SplitHostPort(e.address)
	if err != nil {
		return endpoint{}, fmt.Errorf("%q is no host:port (%w)", s, err)
	}
	// A zone may be written as in -to, with its '%' escaped.
	if ip, zone, ok := strings.Cut(host, "%25"); ok && zone != "" {
		e.address = net.JoinHostPort(ip+"%"+zone, port)
	}
	if _, err := net.LookupPort("tcp", port); err != nil || port == "" {
		return endpoint{}, fmt.Errorf("%q has no port: use a number, or 0 for any that is free", s)
	}
	return e, nil
}

// isLocal reports whether only this machine can connect to the endpoint. Of the host
// names only localhost counts as loopback: what another name means may change.
func (e endpoint) isLocal() bool {
	if e.network == "unix" {
		return true
	}
	host, _, _ := net.SplitHostPort(e.address)
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// mayServe returns an error if the configuration would let a network connect unencrypted
// by mistake.
func (e endpoint) mayServe(cfg *Config) error {
	switch {
	case e.tls || e.isLocal():
		return nil
	case cfg.InsecureListen && cfg.AnyoneCanConnect:
		return nil
	case cfg.InsecureListen || cfg.AnyoneCanConnect:
		return fmt.Errorf("-listen is %s: one of the two flags -insecure-listen and -i-know-that-anyone-can-connect is not enough, it takes both", cfg.Listen)
	}
	return fmt.Errorf("-listen is %s: every machine that reaches this one could use the server, and read what others say to it; "+
		"listen on 127.0.0.1 or a Unix socket, or use tls:// with -cert and -key (and -client-ca); "+
		"if a network is meant to connect without TLS, say both -insecure-listen and -i-know-that-anyone-can-connect", cfg.Listen)
}

// lockForStart and lockForEnd bound how long a start and an end of the gateway wait for
// the lock of a directory.
const lockForStart, lockForEnd = 5 * time.Second, time.Second

// socket is a listening socket. Its file, if it has one, is removed before the socket is
// closed: as long as the socket is open, no other file can have the inode number of its
// file.
type socket struct {
	net.Listener
	path string      // of the socket's file; "": it has none
	file fs.FileInfo // the file that was made for the socket

	ended   atomic.Bool // no more clients may be accepted; set before the deadline
	release sync.Once
}

// listen opens the socket. It replaces a Unix socket that a dead process left behind; if
// a process answers on the socket, listen returns an error. tell is called once if listen
// takes long.
func (e endpoint) listen(ctx context.Context, mode fs.FileMode, tell func(dir string)) (*socket, error) {
	if e.network == "unix" && !strings.HasPrefix(e.address, "@") {
		return listenUnix(ctx, e.address, mode, tell)
	}
	l, err := new(net.ListenConfig).Listen(ctx, e.network, e.address)
	if err != nil {
		return nil, err
	}
	if a, ok := l.Addr().(*net.TCPAddr); ok && e.isLocal() && !a.IP.IsLoopback() { // the hosts file gives localhost another address
		l.Close()
		return nil, fmt.Errorf("%s is %v on this machine, which is not loopback: write 127.0.0.1", e.address, a.IP)
	}
	return &socket{Listener: l}, nil
}

func listenUnix(ctx context.Context, path string, mode fs.FileMode, tell func(dir string)) (*socket, error) {
	locking, cancel := context.WithTimeout(ctx, lockForStart)
	defer cancel()
	unlock, err := lockDirectoryOf(locking, path, tell)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	l, err := bindUnix(path, mode)
	if err != nil {
		return nil, err
	}
	info, err := os.Lstat(path)
	if err != nil {
		l.Close()
		return nil, err
	}
	return &socket{Listener: l, path: path, file: info}, nil
}

// stop makes Accept return, and wakes it if it waits. The socket stays open.
func (s *socket) stop() {
	s.ended.Store(true)
	s.wakeIfStopped()
}

func (s *socket) wakeIfStopped() {
	if d, ok := s.Listener.(interface{ SetDeadline(time.Time) error }); ok && s.ended.Load() {
		d.SetDeadline(past)
	}
}

// Close removes the socket's file, if it is still the file that was made for the socket,
// and closes the socket. The directory's lock keeps another gateway from putting its own
// file there between the check and the removal. If the lock cannot be had, the file
// stays, and the next gateway finds that nobody listens on it.
func (s *socket) Close() (err error) {
	s.release.Do(func() {
		s.stop()
		if s.path != "" {
			locking, cancel := context.WithTimeout(context.Background(), lockForEnd)
			defer cancel()
			unlock, lockErr := lockDirectoryOf(locking, s.path, func(string) {})
			if lockErr == nil {
				defer unlock()
				if now, err := os.Lstat(s.path); err == nil && os.SameFile(now, s.file) {
					os.Remove(s.path)
				}
			}
			err = lockErr
		}
		s.Listener.Close()
	})
	return err
}

// removeStale removes the socket of a process that has ended. The caller holds the lock
// of the directory, so that of two gateways that start at once neither removes the
// other's socket.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode()&fs.ModeSocket == 0:
		return fmt.Errorf("%s exists and is no socket: it is left alone, choose another path", path)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	nc, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err == nil {
		nc.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%s is in use: somebody listens there; stop it, or choose another path", path)
	}
	switch now, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !os.SameFile(now, info):
		return fmt.Errorf("%s was replaced by somebody at this moment: start again", path)
	}
	return os.Remove(path)
}
