// Package connpoolhttp gives the requests of an HTTP server connections of their
// own: all that a request does with a pool, in whatever part of the program that
// has its ctx, gets one connection for each address, and whatever the handler
// does, the end of the request gives it back.
//
//	http.ListenAndServe(addr, connpoolhttp.Middleware(pool)(handler))
//
// What holds within a request is what [connpool.Pool.Session] says. A server
// whose clients keep their connection may want sessions that last as long:
// see [PerConnection].
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

// Middleware wraps handlers so that each request has a session of each of the
// pools in its ctx, from before the handler runs until it has returned, or
// panicked, or the client is gone. A request that took its connection over
// (http.Hijacker) keeps its sessions for as long as its handler runs.
//
// Where the ctx has a session already, from [PerConnection] or from an outer
// Middleware, the request joins it, and its end gives nothing back. So do
// requests that the handler makes of others in the same process, as long as
// they carry its ctx.
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

// PerConnection makes srv give each of its clients' connections a session of
// each of the pools: all requests on it, one after another, get the same pooled
// connection for an address, and give it back when the client's connection
// closes. A client that stays thus keeps connections of the pool in use while
// it is silent. That is the price of a state that lives in the peer's
// connection; where there is none, Middleware is the better choice.
//
// It sets srv.ConnContext and srv.ConnState, since neither is right without the
// other, and calls the ones that were set before. So it is called after those
// have been set and before the server starts; several calls add up. A
// connection that a handler takes over (http.Hijacker) is none of the server's
// from then on, and its sessions end. The concurrent requests of an HTTP/2
// connection take turns at an address.
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
				return nil // which the server reports in its own words
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

// remove forgets nc and returns what is left to be done for it.
func (c *clients) remove(nc net.Conn) (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if end = c.ends[nc]; end == nil {
		return func() {}
	}
	delete(c.ends, nc)
	return end
}

// quietly calls end where a panic, which a Config.Reset may bring about, would
// end the program: it goes to the server's log, as those of handlers do.
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

// sessions begins a session of each pool. end ends them, all of them even if one
// panics over it.
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

// checked is a copy of pools, none of which is nil.
func checked(who string, pools []*connpool.Pool) []*connpool.Pool {
	for i, p := range pools {
		if p == nil {
			panic(fmt.Sprintf("connpoolhttp: %s: pool %d is nil", who, i+1))
		}
	}
	return append([]*connpool.Pool(nil), pools...)
}
