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
// The pool opens a connection when none is idle, takes it back whatever
// happens in the function, closes the least recently used idle one when the
// limit on open connections or the process's file handles run out, and never
// lends a connection that is dead or has unread bytes. See [Pool.With] for the
// contract.
//
// # Addresses
//
// An [Addr] says transport, host, port, TLS name, scope and quality of
// service. It is the key of the pool: two addresses that differ in any field
// never share a connection, and everything that shapes a connection is in it.
//
// # Giving back
//
// fn's result is the verdict on the connection. nil and [Keep] give it back;
// any other error, a panic, runtime.Goexit, a ctx that is done, an operation
// still running, bytes left unread or unflushed, or an operation that failed closes it. The
// default is to discard, because a connection that is out of step delivers
// other people's replies.
//
// # Holding
//
// What lasts longer than one function holds a connection in one of two ways. A
// [Pool.Session] puts it into a ctx: every With under that ctx, in whatever part
// of the program, one inside the other or one after another, gets the same
// connection for an address, until the session ends. It is the way of a request
// whose parts all talk to one peer, and of a transaction; package connpoolhttp
// gives each HTTP request one. A [Pool.Lease] puts it into a hand: a net.Conn
// whose Close gives it back, for layers that own their connection, and for
// conversations that no function can contain.
//
// Both can be forgotten, as With cannot. When nobody can reach a lease or a
// session any more, its connection is closed, its slot is free, and the leak is
// reported, with the place of the borrow (of a session only if Config.HoldWarn,
// Profile or Debug is set). Config.HoldWarn reports what is held for long, and
// Config.Profile shows what is held at the moment, and by whom.
//
// # Order
//
// Idle connections are lent last in, first out, so that a small busy set stays
// warm and the rest expires. Borrowers that must wait are served first come,
// first served. A waiter takes what comes first, a connection given back or
// the one that is being opened on its behalf; a dial that comes too late
// serves the next waiter or goes idle, and of several that nobody needs any
// more all but one are given up.
//
// # Before it is needed
//
// [Pool.Warm] opens a first set of connections to an address, several at a
// time, and tells at start whether the peer is there. Config.MinIdlePerAddr keeps some
// in reserve for each address that is in use: while the last one is lent, the
// next is opened. Neither takes room from a borrower or from what is idle, and
// an address that nobody uses any more loses its reserve.
//
// # Limits that change
//
// [Pool.SetLimits] changes the limits of a pool at work. Lowering them closes
// idle connections and never touches a loan; raising them lets the oldest
// waiters go on.
//
// # Peers that speak unasked
//
// Without more, bytes on an idle connection close it. With Config.Push they are
// messages: an idle connection that has some is lent to Push, which reads them,
// and then it is idle again or, by the verdict of Push, closed. [Conn.Context] is
// for what lives beside a connection as long as that lives.
//
// # Connections that others keep
//
// [Pool.DialContext] is for a library that wants a dialer and keeps its
// connections itself, as an http.Transport does. The pool counts them until they
// are closed, makes room for them, and has them wait when there is none.
package connpool
