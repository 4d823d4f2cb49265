package connpool

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"
)

// Clients that own the I/O of their connection. A codec of Setup works only during loans. Some
// clients cannot live like that: they read their connection all the time, on a goroutine of
// their own (a resident client), or they dial for themselves and show no connection at all (a
// carried client). The pool lends the client then, exclusively as ever, and leaves the I/O to
// it. Who does what:
//
//	                     a codec of Setup             a resident client                a carried client
//	dials                the pool                     the pool                         the client
//	reads and writes     fn, between begin and end    the client, from Setup to close  the client
//	sets deadlines       fn, up to that of its ctx    the client                       the client
//	an unread reply      is found, and closes         is the client's matter           is the client's matter
//	the end of the ctx   interrupts fn's I/O          closes the connection            closes the client
//	hears of the end     the watcher, the probe       its failed I/O, the watcher,     alive
//	                                                  alive
//	a clean close        Close of the state, then     Close of the client, then the    Close of the client, then
//	                     the socket                   socket                           its socket if it is known
//	any other close      the socket, then Close of    the socket, then Close of the    its socket if it is known,
//	                     the state                    client                           then Close of the client
//
// The last two lines are conn_close.go. In a clean close the client's connection works while its
// Close runs; if Close closes that connection, the socket is closed then.
//
// flagResident in the state word says that a connection has such a client. It is set once, at
// the end of the dial. From then on the guard (the net.Conn that Setup got) works whether there
// is a loan or not, and the Conn of a loan refuses I/O. The guard's operations are counted in
// the state word like those of a loan, but say nothing about the loan, see operating.

// Resident marks client, the state that Setup returns, as a client that reads its connection
// all the time:
//
//	Setup: func(ctx context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
//		l := ldap.NewConn(nc, false)
//		l.Start()
//		return connpool.Resident(l, func() error {
//			if l.IsClosing() {
//				return net.ErrClosed
//			}
//			return nil
//		}), nil
//	}
//
// A borrower gets client with State, and has it alone. The net.Conn that Setup got works from
// Setup to the close of the connection, also between loans. A failed Read or Write of client,
// other than a Read whose deadline passed, is the end of the connection: if it is idle, the pool
// closes it at once. alive, if it is not nil, is asked before each loan and in each sweep; an
// error closes the connection, and the borrower gets another. A panic in alive goes on to the
// borrower. alive must not block; it has a quarter of a second. The pool never calls it twice at
// the same time for one client, and never in a loan.
//
// For such a connection the pool does not look for unread bytes, neither in the socket nor in
// client, and calls no Config.Push: what the peer sends is client's. So use Resident only for a
// protocol that matches each reply to its request by an id, as LDAP, IMAP, JSON-RPC, net/rpc and
// DNS do. In a protocol that matches replies by their position, the next borrower would get
// the reply to a request that the last one gave up.
//
// The Conn of a loan refuses Read, Write and deadlines, with an error that is
// errors.ErrUnsupported. A ctx that ends during a loan closes the connection, since the
// deadlines of the connection are client's. Conn.Close does, too, and so does client when it
// closes its net.Conn. State returns client to the end of the loan, also when the connection is
// closed; client's I/O fails then. If client is an io.Closer, its Close runs before a clean
// close, and may say goodbye to the peer: see Config.Setup. Close may be called beside other
// methods of client, in the middle of a loan whose ctx has ended, and after client has closed its
// net.Conn. Deadlines that are set in Setup end with Setup. Everything else is as for other
// connections: limits, MaxUses, lifetimes, Reset, Check, Keep, Retire, and the check of the
// descriptor.
func Resident(client any, alive func() error) any { return &resident{client: client, alive: alive} }

// Carry returns what a dialer (Config.Dialers) may return for a client that dials for itself
// and does not read or write through a net.Conn of the pool:
//
//	Dialers: map[connpool.Transport]connpool.DialFunc{
//		"redis": func(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
//			c, err := redis.DialContext(ctx, "tcp", addr.HostPort())
//			if err != nil {
//				return nil, err
//			}
//			return connpool.Carry(c, c.Err, nil), nil
//		},
//	},
//
// A borrower gets client with State. What [Resident] says of unread replies, alive, the Conn of
// a loan and the end of a ctx holds here, too. A Setup runs as for other connections, finds
// client with State of its net.Conn, and may return another state, or nil to keep client; it
// must return no Resident. When the pool closes the connection, it calls Close of client, if
// client is an io.Closer. Close must end client's I/O that is under way. The dialer returns the
// result of Carry itself: in a wrapper it is a connection that can neither be read nor written.
//
// socket is the connection below client, if client shows it, else nil. With it the pool hears at
// once when the peer hangs up (on Linux), and before each loan and in each sweep it checks the
// descriptor and looks whether the peer has closed (unless Config.NoProbe is set). The pool
// closes socket after client, or before client if an exchange was broken off. So Close of a
// client that is not safe for concurrent use can find out, by an error of SetDeadline of socket,
// that a borrower may still be in client, and leave client alone then. A connection without
// socket and without alive is judged by its age only.
func Carry(client any, alive func() error, socket net.Conn) net.Conn {
	if isNil(socket) {
		socket = nil
	}
	return &carrier{resident: resident{client: client, alive: alive}, socket: socket}
}

// resident is the client of a connection with flagResident.
type resident struct {
	client any
	alive  func() error          // nil: there is nothing to ask
	end    atomic.Pointer[error] // why the client's I/O ended; nil while it goes on
}

// ended returns why the client's I/O ended, nil if it goes on.
func (r *resident) ended() error {
	if end := r.end.Load(); end != nil {
		return *end
	}
	return nil
}

// errResident is the error of I/O over the Conn of a loan whose connection has a client.
var errResident = fmt.Errorf("connpool: a resident or carried client does the I/O of this connection: use State, which returns the client (%w)", errors.ErrUnsupported)

// carrier is the net.Conn of a client that does its own I/O.
type carrier struct {
	resident
	socket net.Conn // nil: not known
	closed atomic.Bool
}

func (k *carrier) Read([]byte) (int, error)         { return 0, errResident }
func (k *carrier) Write([]byte) (int, error)        { return 0, errResident }
func (k *carrier) SetDeadline(time.Time) error      { return errResident }
func (k *carrier) SetReadDeadline(time.Time) error  { return errResident }
func (k *carrier) SetWriteDeadline(time.Time) error { return errResident }

// LocalAddr returns the address of the connection below the client; nil if that is not known.
func (k *carrier) LocalAddr() net.Addr {
	if k.socket == nil {
		return nil
	}
	return k.socket.LocalAddr()
}

// RemoteAddr is like LocalAddr.
func (k *carrier) RemoteAddr() net.Addr {
	if k.socket == nil {
		return nil
	}
	return k.socket.RemoteAddr()
}

// NetConn returns the connection below the client, nil if it is not known.
func (k *carrier) NetConn() net.Conn { return k.socket }

// Close closes the client, if that is an io.Closer, and then the connection below the client.
func (k *carrier) Close() error { return k.end(true) }

// end closes the client and the connection below it: the client first if it is in step with its
// peer and may say goodbye, else the connection first, so that a client that waits for its peer
// need not wait any more.
func (k *carrier) end(inStep bool) error {
	if k.closed.Swap(true) {
		return net.ErrClosed
	}
	var err error
	if k.socket != nil {
		if !inStep {
			k.socket.Close()
		}
		defer k.socket.Close() // the client has closed it already, in most cases
	}
	if c, ok := k.client.(io.Closer); ok {
		err = c.Close()
	}
	return err
}
