// Package conform is a module of its own, so that the module of the pool does not
// require golang.org/x/net: its tests run the conformance test of net.Conn.
package conform
