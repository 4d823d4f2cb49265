// Package connpooltest is for tests of clients that use package connpool. It finds out
// whether a client ever hands the reply to one request to the borrower of another.
//
// A [Harness] has the server's side of the client's protocol and the client. [Fuzz] turns
// the bytes of go test -fuzz into a [Script]: what the server does wrong in each of a
// few exchanges. The harness plays the script, and fails the test if an exchange that
// reported success got a reply that is not its own. Then it looks for the shortest script
// that fails in the same way, and prints it with everything that happened:
//
//	func FuzzStore(f *testing.F) {
//		connpooltest.Fuzz(f, connpooltest.Harness{
//			Protocol: connpooltest.Lines(func(key string) string { return "value of " + key }),
//			Client: func(pool *connpool.Pool, addr connpool.Addr) (connpooltest.Exchange, func()) {
//				return NewStore(pool, addr).Get, nil
//			},
//		})
//	}
//
// [Desync] does the same with a fixed number of scripts, as an ordinary test.
//
// By default a script is played in a bubble of package testing/synctest, over a network in
// memory. Time-outs take no time there, and a script has the same outcome each time. With
// Harness.Loopback it is played over TCP sockets and in real time.
//
// A [Server] is the same scripted peer for tests that a client has already: the test says
// which faults the next replies have ([Server.Play]), cuts the idle connections
// ([Server.CutIdle]) or makes the next dial fail ([Server.FailNextDial]), and
// [AssertReturned] checks that every connection went back to the pool.
package connpooltest
