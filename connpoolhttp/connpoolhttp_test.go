package connpoolhttp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// backend is a server that tags its replies, and a pool that reaches it.
type backend struct {
	t    *testing.T
	srv  *faultnet.Server
	pool *connpool.Pool
	addr connpool.Addr
}

func start(t *testing.T, cfg connpool.Config) *backend {
	t.Helper()
	srv, err := faultnet.Start(faultnet.Options{})
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	pool, err := connpool.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, pool.Close()) })
	return &backend{t, srv, pool, connpool.Addr{Transport: connpool.TCP, Host: srv.Host(), Port: srv.Port()}}
}

// ask exchanges one message and returns the serial number of the connection.
func (b *backend) ask(ctx context.Context) (serial int, err error) {
	err = b.pool.With(ctx, b.addr, func(c connpool.Conn) (err error) {
		serial, err = exchange(c)
		return err
	})
	return serial, err
}

func exchange(c net.Conn) (serial int, err error) {
	if _, err := io.WriteString(c, "x\n"); err != nil {
		return 0, err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return 0, err
	}
	_, err = fmt.Sscan(line, &serial)
	return serial, err
}

// settles waits until the pool's gauges have these values.
func (b *backend) settles(inUse, idle int) {
	b.t.Helper()
	want := [2]int{inUse, idle}
	for end := time.Now().Add(time.Minute); ; {
		st := b.pool.Stats()
		got := [2]int{st.InUse, st.Idle}
		if got == want {
			return
		}
		if time.Now().After(end) {
			require.Equal(b.t, want, got, "in use, idle")
		}
		<-time.After(time.Millisecond)
	}
}

func get(t *testing.T, client *http.Client, url string) string {
	t.Helper()
	resp, err := client.Get(url)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(body)
}

// APR-15, APR-16, APR-17, APR-X21
func TestARequestHasAConnectionOfItsOwn(t *testing.T) {
	b := start(t, connpool.Config{MaxPerAddr: 1})
	var inner http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A part of the program that does not know the others.
		ctx, cancel := context.WithTimeout(r.Context(), time.Minute)
		defer cancel()
		serial, err := b.ask(ctx)
		fmt.Fprintln(w, serial, err, b.pool.Stats().InUse)
	})
	srv := httptest.NewServer(Middleware(b.pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inner.ServeHTTP(w, r) // one after another
		err := b.pool.With(r.Context(), b.addr, func(c connpool.Conn) error {
			inner.ServeHTTP(w, r) // nested: MaxPerAddr is 1, and the inner use does not wait
			// An internal redirect that goes through the middleware again.
			sub, err := http.NewRequestWithContext(r.Context(), "GET", "/", nil)
			if err != nil {
				return err
			}
			Middleware(b.pool)(inner).ServeHTTP(w, sub)
			serial, err := exchange(c)
			fmt.Fprintln(w, serial, err, b.pool.Stats().InUse)
			return err
		})
		if err != nil {
			t.Error(err)
		}
		inner.ServeHTTP(w, r)
		// The handler returns without giving anything back.
	})))
	defer srv.Close()
	for range 3 {
		require.Equal(t, strings.Repeat("1 <nil> 1\n", 5), get(t, srv.Client(), srv.URL))
		b.settles(0, 1)
	}
	require.Equal(t, 1, b.srv.Accepts())
}

// Requests that run at the same time have one connection each.
func TestTwoRequestsShareNothing(t *testing.T) {
	b := start(t, connpool.Config{})
	var mu sync.Mutex
	serials := make(map[int]int)
	const k = 8
	var barrier tasks.Group
	barrier.Add(k)
	srv := httptest.NewServer(Middleware(b.pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for i := range 3 {
			serial, err := b.ask(r.Context())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			serials[serial]++
			mu.Unlock()
			if i == 0 {
				barrier.Done()
				barrier.Wait()
			}
		}
	})))
	defer srv.Close()
	var wg tasks.Group
	for range k {
		wg.Go(func() { get(t, srv.Client(), srv.URL) })
	}
	wg.Wait()
	b.settles(0, k)
	require.Len(t, serials, k)
	for serial, n := range serials {
		require.Equal(t, 3, n, "connection %d", serial)
	}
}

// APR-16: however the request ends.
func TestTheEndOfARequestGivesBackHoweverItComes(t *testing.T) {
	b := start(t, connpool.Config{MaxPerAddr: 1})
	quiet := log.New(io.Discard, "", 0)
	inside, release := make(chan struct{}), make(chan struct{})
	srv := httptest.NewUnstartedServer(Middleware(b.pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := b.ask(r.Context()); err != nil {
			t.Error(err)
		}
		switch r.URL.Path {
		case "/panic":
			panic("x")
		case "/abort":
			panic(http.ErrAbortHandler)
		case "/gone":
			close(inside)
			<-r.Context().Done() // the client hung up, and the handler goes on
			<-release
			if _, err := b.ask(r.Context()); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		case "/hijack":
			nc, rw, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer nc.Close()
			if serial, err := b.ask(r.Context()); err != nil || b.pool.Stats().InUse != 1 {
				t.Error(serial, err)
			}
			rw.WriteString("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
			rw.Flush()
		}
	})))
	srv.Config.ErrorLog = quiet
	srv.Start()
	defer srv.Close()
	for _, path := range []string{"/", "/panic", "/abort", "/hijack"} {
		resp, err := srv.Client().Get(srv.URL + path)
		if err == nil {
			resp.Body.Close()
		}
		b.settles(0, 1)
	}
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "GET", srv.URL+"/gone", nil)
	require.NoError(t, err)
	failed := make(chan error)
	go func() { _, err := srv.Client().Do(req); failed <- err }()
	<-inside
	cancel()
	require.Error(t, <-failed)
	b.settles(0, 1) // though the handler has not returned
	close(release)
	require.Equal(t, 1, b.srv.Accepts())
}

// APR-X22
func TestAClientsConnectionHasAConnectionOfItsOwn(t *testing.T) {
	b := start(t, connpool.Config{})
	states := make(chan http.ConnState, 100)
	type key struct{}
	srv := httptest.NewUnstartedServer(Middleware(b.pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		serial, err := b.ask(r.Context())
		fmt.Fprintf(w, "%d %v %v", serial, err, r.Context().Value(key{}))
		if r.URL.Path == "/hijack" {
			nc, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			nc.Close()
		}
	})))
	srv.Config.ConnContext = func(ctx context.Context, _ net.Conn) context.Context { return context.WithValue(ctx, key{}, "mine") }
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) { states <- s }
	PerConnection(srv.Config, b.pool)
	srv.Start()
	defer srv.Close()

	first, second := &http.Client{Transport: &http.Transport{}}, &http.Client{Transport: &http.Transport{}}
	for range 3 { // three requests on a connection that is kept
		require.Equal(t, "1 <nil> mine", get(t, first, srv.URL))
		require.Equal(t, "2 <nil> mine", get(t, second, srv.URL))
		require.Equal(t, 2, b.pool.Stats().InUse)
	}
	first.CloseIdleConnections()
	b.settles(1, 1)
	resp, err := second.Get(srv.URL + "/hijack")
	if err == nil {
		resp.Body.Close()
	}
	b.settles(0, 2)
	seen := make(map[http.ConnState]bool)
	for len(states) > 0 {
		seen[<-states] = true
	}
	for _, s := range []http.ConnState{http.StateNew, http.StateActive, http.StateIdle, http.StateClosed, http.StateHijacked} {
		require.True(t, seen[s], "the server's own hook was told of %v", s)
	}
	require.Equal(t, 2, b.srv.Accepts())
	// The end of the server ends all sessions.
	get(t, first, srv.URL)
	b.settles(1, 1)
	srv.Close()
	b.settles(0, 2)
}

func TestConcurrentRequestsOfOneClientTakeTurns(t *testing.T) {
	b := start(t, connpool.Config{})
	var mu sync.Mutex
	inside, most := 0, 0
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		err := b.pool.With(r.Context(), b.addr, func(c connpool.Conn) error {
			mu.Lock()
			inside++
			most = max(most, inside)
			mu.Unlock()
			defer func() { mu.Lock(); inside--; mu.Unlock() }()
			serial, err := exchange(c)
			fmt.Fprint(w, r.ProtoMajor, serial)
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}))
	srv.EnableHTTP2 = true
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // of clients that dialed once too often
	PerConnection(srv.Config, b.pool)
	srv.StartTLS()
	defer srv.Close()
	require.Equal(t, "2 1", get(t, srv.Client(), srv.URL)) // so that all of them share one connection
	var wg tasks.Group
	for range 16 {
		wg.Go(func() {
			if body := get(t, srv.Client(), srv.URL); body != "2 1" {
				t.Errorf("got %q", body)
			}
		})
	}
	wg.Wait()
	require.Equal(t, 1, most)
	srv.Client().CloseIdleConnections()
	b.settles(0, 1)
}

func TestEachPoolHasItsSession(t *testing.T) {
	one, two := start(t, connpool.Config{MaxOpen: 1}), start(t, connpool.Config{MaxOpen: 1})
	srv := httptest.NewServer(Middleware(one.pool, two.pool)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, b := range []*backend{one, two} {
			if _, err := b.ask(r.Context()); err != nil {
				t.Error(err)
			}
		}
		fmt.Fprint(w, one.pool.Stats().InUse, two.pool.Stats().InUse)
	})))
	defer srv.Close()
	require.Equal(t, "1 1", get(t, srv.Client(), srv.URL))
	one.settles(0, 1)
	two.settles(0, 1)
}

// A Reset that panics ends a request, not the server.
func TestAPanicAtTheEndOfAClientIsTheLogs(t *testing.T) {
	b := start(t, connpool.Config{Reset: func(context.Context, connpool.Conn) error { panic("no way back") }})
	var mu sync.Mutex
	var out bytes.Buffer
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := b.ask(r.Context()); err != nil {
			t.Error(err)
		}
	}))
	srv.Config.ErrorLog = log.New(locked{&mu, &out}, "", 0)
	PerConnection(srv.Config, b.pool)
	srv.Start()
	defer srv.Close()
	get(t, srv.Client(), srv.URL)
	srv.Client().CloseIdleConnections()
	b.settles(0, 0)
	for said := false; !said; {
		mu.Lock()
		said = strings.Contains(out.String(), "the end of a session panicked: Config.Reset panicked: no way back")
		mu.Unlock()
	}
	get(t, srv.Client(), srv.URL)
}

type locked struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

func TestWhatIsNilIsNamed(t *testing.T) {
	pool := new(connpool.Pool)
	require.PanicsWithValue(t, "connpoolhttp: Middleware: pool 2 is nil", func() { Middleware(pool, nil) })
	require.PanicsWithValue(t, "connpoolhttp: PerConnection: pool 1 is nil", func() { PerConnection(new(http.Server), nil) })
	require.PanicsWithValue(t, "connpoolhttp: PerConnection: the server is nil", func() { PerConnection(nil, pool) })
	srv := new(http.Server)
	PerConnection(srv)
	require.Nil(t, srv.ConnContext)
	PerConnection(srv, pool)
	require.PanicsWithValue(t, "connpoolhttp: PerConnection: connections of type connpoolhttp.odd cannot be told apart: let the listener return pointers",
		func() { srv.ConnContext(t.Context(), odd{}) })
	rec := httptest.NewRecorder()
	Middleware()(http.NotFoundHandler()).ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
	require.Equal(t, http.StatusNotFound, rec.Code)
}

type odd struct {
	net.Conn
	_ []byte
}

// TRY-41
func TestAClientThatGoesAwayAsItsRequestEndsLeavesNothingOut(t *testing.T) {
	b := start(t, connpool.Config{})
	h := Middleware(b.pool)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_ = b.pool.With(r.Context(), b.addr, func(connpool.Conn) error { return nil })
	}))
	rounds := 20000
	if testing.Short() {
		rounds = 2000
	}
	for i := range rounds {
		ctx, cancel := context.WithCancel(t.Context())
		r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
		var gone tasks.Group
		gone.Go(func() {
			for range i % 64 {
				runtime.KeepAlive(i)
			}
			cancel() // as net/http does
		})
		h.ServeHTTP(httptest.NewRecorder(), r)
		gone.Wait()
	}
	for end := time.Now().Add(time.Minute); b.pool.Stats().InUse > 0; {
		require.False(t, time.Now().After(end), "%v", b.pool.Stats())
		<-time.After(time.Millisecond)
	}
}
