// Package connpoolhttp gives each request of an HTTP server pooled connections of its
// own. All uses of a pool under the request's ctx, in any part of the program, share one
// connection for each address. The end of the request gives the connection back, whatever
// the handler does.
//
//	http.ListenAndServe(addr, connpoolhttp.Middleware(pool)(handler))
//
// [connpool.Pool.Session] describes what holds within a request. If the clients of a
// server keep their connections open, sessions may instead last as long as a client's
// connection: see [PerConnection].
package connpoolhttp

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"reflect"
	"sync"

	"github.com/seed-ecb488c9/connpool"
)

// Middleware wraps handlers so that the ctx of each request has a session of each of the
// pools. A session begins before the handler runs. It ends when the handler has returned
// or panicked, or when the client is gone. A request that took its connection over
// (http.Hijacker) keeps its sessions for as long as its handler runs.
//
// If the ctx already has a session, from [PerConnection] or from an outer Middleware, the
// request joins that session, and the end of the request gives nothing back. The same
// holds for requests that the handler makes to other handlers in the same process with
// its ctx.
//
// Middleware panics if a pool is nil. Without pools it does nothing.
func Middleware(pools ...*connpool.Pool) func(http.Handler) http.Handler {
	pools = checked("Middleware", pools)
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx, end := sessions(r.Context(), pools)
			defer end()
			next.ServeHTTP(w, r.WithContext(ctx))
		})
	}
}

// PerConnection makes srv give each client connection a session of each of the pools. All
// requests on a client connection, one after another, get the same pooled connection for
// an address. The session ends when the client's connection closes. So a silent client
// that stays connected keeps connections of the pool in use. That is the price of state
// that lives in the peer's connection; without such state Middleware is the better
// choice.
//
// PerConnection sets srv.ConnContext and srv.ConnState, and calls the functions that were
// set before. Call it after setting those and before the server starts; several calls add
// up. When a handler takes a connection over (http.Hijacker), the connection leaves the
// server and its sessions end. The concurrent requests of an HTTP/2 connection take turns
// at an address.
//
// PerConnection panics if srv or a pool is nil. Without pools it does nothing.
func PerConnection(srv *http.Server, pools ...*connpool.Pool) {
	if srv == nil {
		panic("connpoolhttp: PerConnection: the server is nil")
	}
	if pools = checked("PerConnection", pools); len(pools) == 0 {
		return
	}
	c := &clients{ends: make(map[net.Conn]func())}
	connContext, connState := srv.ConnContext, srv.ConnState
	srv.ConnContext = func(ctx context.Context, nc net.Conn) context.Context {
		if connContext != nil {
			if ctx = connContext(ctx, nc); ctx == nil {
				return nil // the server reports the nil ctx in its own words
			}
		}
		if !reflect.TypeOf(nc).Comparable() {
			panic(fmt.Sprintf("connpoolhttp: PerConnection: connections of type %T cannot be told apart: let the listener return pointers", nc))
		}
		ctx, end := sessions(ctx, pools)
		c.add(nc, end)
		return ctx
	}
	srv.ConnState = func(nc net.Conn, state http.ConnState) {
		if state == http.StateClosed || state == http.StateHijacked {
			defer quietly(srv, c.remove(nc))
		}
		if connState != nil {
			connState(nc, state)
		}
	}
}

// clients are the open connections of a server's clients.
type clients struct {
	mu   sync.Mutex // guards ends; nothing else happens under it
	ends map[net.Conn]func()
}

func (c *clients) add(nc net.Conn, end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ends[nc] = end
}

// remove drops nc and returns the function that ends its sessions.
func (c *clients) remove(nc net.Conn) (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if end = c.ends[nc]; end == nil {
		return func() {}
	}
	delete(c.ends, nc)
	return end
}

// quietly calls end. A panic in end, which a Config.Reset may cause, goes to the server's
// log, as a handler's panic does; here it would otherwise end the program.
func quietly(srv *http.Server, end func()) {
	defer func() {
		v := recover()
		switch {
		case v == nil:
		case srv.ErrorLog != nil:
			srv.ErrorLog.Printf("connpoolhttp: the end of a session panicked: %v", v)
		default:
			log.Printf("connpoolhttp: the end of a session panicked: %v", v)
		}
	}()
	end()
}

// sessions begins a session of each pool. end ends all of them, even if one of them
// panics.
func sessions(ctx context.Context, pools []*connpool.Pool) (_ context.Context, end func()) {
	ends := make([]func(), len(pools))
	for i, p := range pools {
		ctx, ends[i] = p.Session(ctx)
	}
	return ctx, func() {
		for _, end := range ends {
			defer end()
		}
	}
}

// checked returns a copy of pools; it panics if one of them is nil.
func checked(who string, pools []*connpool.Pool) []*connpool.Pool {
	for i, p := range pools {
		if p == nil {
			panic(fmt.Sprintf("connpoolhttp: %s: pool %d is nil", who, i+1))
		}
	}
	return append([]*connpool.Pool(nil), pools...)
}
