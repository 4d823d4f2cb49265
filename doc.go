// Package connpool lends client connections.
//
// A caller names a peer by a portable address and gets a live, clean
// connection that nobody else uses:
//
//	pool, err := connpool.New(connpool.Config{})
//	addr := connpool.MustParseAddr("tls://db.example:5432?scope=tenant7")
//	err = pool.With(ctx, addr, func(c connpool.Conn) error {
//		_, err := c.Write(request)
//		...
//		return err
//	})
//
// The pool opens a connection when none is idle, and takes the connection back
// whatever happens in the function. It closes the least recently used idle
// connection when the limit on open connections or the process's file handles run
// out. It never lends a connection that is dead or has unread bytes. See
// [Pool.With] for the contract.
//
// # Addresses
//
// An [Addr] says transport, host, port, TLS name, scope and quality of
// service. It is the key of the pool: two addresses that differ in any field
// never share a connection, and everything that shapes a connection is in it.
//
// # Giving back
//
// fn's result decides what happens to the connection. nil and [Keep] give it back.
// Any other error, a panic, runtime.Goexit, a ctx that is done, an operation still
// running, bytes left unread or unflushed, or an operation that failed closes it. The
// default is to discard, because a connection that is out of step delivers other
// people's replies.
//
// # Holding
//
// A use that lasts longer than one function has a connection in one of two ways. A
// [Pool.Session] puts a connection into a ctx: every With under that ctx, in whatever
// part of the program, one inside the other or one after another, gets the same
// connection for an address, until the session ends. A session fits a request whose
// parts all talk to one peer, and a transaction; package connpoolhttp gives each HTTP
// request one. A [Pool.Lease] is a net.Conn whose Close gives the connection back,
// for layers that own their connection, and for conversations that no function can
// contain.
//
// A program can forget to end a lease or session; With cannot be forgotten. When
// nobody can reach a lease or a session any more, the pool closes its connection,
// frees its slot, and reports the leak with the place of the borrow (for a session
// only if Config.HoldWarn, Profile or Debug is set). Config.HoldWarn reports loans
// that last long, and Config.Profile shows the loans that last now, and who has them.
//
// # Order
//
// The pool lends idle connections last in, first out, so that a small busy set stays
// warm and the rest expires. Borrowers that must wait are served first come, first
// served. A waiter takes the connection that comes first, a returned one or the one
// that is being opened on its behalf. A dial that ends too late for its waiter serves
// the next waiter or its connection becomes idle. Of several dials that nobody needs
// any more, the pool gives up all but one.
//
// # Before it is needed
//
// [Pool.Warm] opens a first set of connections to an address, several at a time, and
// shows at the start of a program whether the peer is there. Config.MinIdlePerAddr keeps
// some idle connections for each address that is in use: while the last one is lent, the
// next is opened. Neither takes room from a borrower or from idle connections, and an
// address that nobody uses any more loses its reserve.
//
// # Limits that change
//
// [Pool.SetLimits] changes the limits of a working pool. Lowering them closes idle
// connections and never touches a loan; raising them lets the oldest waiters go on.
//
// # Peers that speak unasked
//
// Without Config.Push, bytes on an idle connection close it. With Config.Push the bytes
// are messages: an idle connection that has some is lent to Push, which reads them.
// Then the connection is idle again or, if Push says so, closed. [Conn.Context] is for
// what exists beside a connection as long as the connection exists.
//
// # Connections that others keep
//
// [Pool.DialContext] is for a library that wants a dialer and keeps its connections
// itself, as an http.Transport does. The pool counts these connections until they are
// closed, makes room for them, and makes their dials wait when there is no room.
package connpool
