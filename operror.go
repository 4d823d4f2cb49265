package connpool

import (
	"errors"
	"net"
	"strings"
)

// Errors for code that expects the error types of package net's dialer and asserts them.

// opError returns e as a *net.OpError. network and address are what the caller passed to
// DialContext; if they are "", opError takes them from e.Addr.
func (e *Error) opError(network, address string) *net.OpError {
	if network == "" {
		network, address = string(e.Addr.Transport), e.Addr.HostPort()
		if e.Addr.Transport == TLS {
			network = string(TCP)
		}
	}
	op := &net.OpError{Op: "dial", Net: network, Err: &dialFailure{e}}
	if address != "" {
		op.Addr = dialedAddr{network, address}
	}
	var own *net.OpError
	if errors.As(e.Err, &own) && own.Op == "dial" && own.Addr != nil {
		op.Source, op.Addr = own.Source, own.Addr
	}
	return op
}

// dialFailure is an *Error inside a net.OpError. Its text leaves out the address, which
// the OpError shows already.
type dialFailure struct{ e *Error }

func (f *dialFailure) Error() string {
	var own *net.OpError
	if f.e.Stage == StageDial && errors.As(f.e.Err, &own) && own.Op == "dial" && own.Err != nil {
		return textOf(own.Err)
	}
	short := *f.e
	short.Addr = Addr{}
	return strings.TrimPrefix(short.Error(), "connpool: ")
}

func (f *dialFailure) Unwrap() error   { return f.e }
func (f *dialFailure) Timeout() bool   { return f.e.Timeout() }
func (f *dialFailure) Temporary() bool { return f.e.Temporary() }

// dialedAddr is the address that a dial was for.
type dialedAddr struct{ network, address string }

func (a dialedAddr) Network() string { return a.network }
func (a dialedAddr) String() string  { return a.address }
