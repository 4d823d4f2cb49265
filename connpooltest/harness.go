package connpooltest

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// Exchange makes one exchange: it sends a request that contains the token, as it is, and
// returns the reply, or the part of the reply that contains the token. ctx has a deadline,
// and may be cancelled. Several calls may run at once.
type Exchange func(ctx context.Context, token string) (reply string, err error)

// Harness plays scripts against a client. The zero value of every field but Protocol and
// Client is a good choice. A Harness is not changed by its methods.
type Harness struct {
	// Protocol is the server's side. Requests that contain no token, such as a login in
	// Config.Setup, are answered without a fault.
	Protocol Protocol

	// Config is the Config of the pool, with the Setup and the other hooks of the client.
	// The harness adds the dialer. MaxPerAddr 0 means 2 here, so that borrowers also
	// wait.
	Config connpool.Config

	// Client makes the client under test, over a pool and for the address of the server.
	// It is called once for each script. The second result ends the client, if it holds
	// connections or goroutines; it is called after the last exchange, and may be nil.
	//
	// In a bubble, the client must not wait for a channel, a timer or another thing that
	// was made outside it, as a package variable is.
	Client func(pool *connpool.Pool, addr connpool.Addr) (exchange Exchange, end func())

	// Borrowers is how many exchanges may be under way at once. 0: 3.
	Borrowers int

	// Patience is the deadline of the ctx of each exchange, from its start. If the
	// client has a time-out of its own, it must be shorter, or it never takes effect.
	// 0: 1 second in a bubble, 100 milliseconds on loopback.
	Patience time.Duration

	// Matched says that a reply shows which request it belongs to, and that the client
	// checks this. Without Matched an exchange whose reply was Wrong, or had a frame
	// Ahead, may report any reply but that of another exchange, since no client that
	// matches replies by position can do better.
	Matched bool

	// Loopback plays scripts over TCP sockets and in real time instead of in a bubble. It
	// is needed for a client that waits for the network while it holds a sync.Mutex, and
	// for one that needs a socket. A script is slower then, and may have another outcome
	// the next time.
	Loopback bool

	// Executions is how many random scripts Search and Desync try after the fixed ones.
	// 0: 500, or 20 on loopback; negative: none.
	Executions int

	// Seed chooses the random scripts. The same Seed means the same scripts.
	Seed uint64
}

func (h Harness) borrowers() int {
	if h.Borrowers > 0 {
		return h.Borrowers
	}
	return 3
}

func (h Harness) patience() time.Duration {
	switch {
	case h.Patience > 0:
		return h.Patience
	case h.Loopback:
		return 100 * time.Millisecond
	}
	return time.Second
}

// grace is how long the harness waits for what should have happened: for a call after the
// end of its ctx, and for connections that are being closed. In a bubble it costs nothing.
const grace = time.Minute

// Run plays one script, with a server and a pool of its own. The error is a *[Failure] if
// the client failed, another error if there is no pool for the Config or no port for
// the server, and nil otherwise. t is only used to start the bubble, and does not fail; it
// may be nil on loopback.
//
// In a bubble, a client that waits for the network while it holds a mutex stops the clock
// of the bubble. Run panics after a minute of this.
func (h Harness) Run(t *testing.T, script Script) (err error) {
	if h.Protocol.ReadRequest == nil || h.Protocol.Reply == nil || h.Client == nil {
		panic("connpooltest: a Harness needs a Protocol with ReadRequest and Reply, and a Client")
	}
	if len(script) >= 999 {
		return fmt.Errorf("connpooltest: a script of %d steps; 998 at most can be told apart", len(script))
	}
	if h.Loopback {
		return h.play(script, func() {})
	}
	stuck := time.AfterFunc(grace, func() {
		stacks := make([]byte, 1<<20)
		os.Stderr.Write(stacks[:runtime.Stack(stacks, true)])
		panic(fmt.Sprintf("connpooltest: the script %q has not ended in a minute: does the client wait while it holds a mutex? Then set Harness.Loopback", script))
	})
	defer stuck.Stop()
	played := false
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if !played || !strings.HasPrefix(fmt.Sprint(p), "deadlock: ") {
			panic(p)
		}
		if err == nil { // else the failure says more
			err = &Failure{Kind: Leaked, Text: "goroutines are left of the client:\n" + leftInBubble(), Script: script, Step: -1}
		}
	}()
	synctest.Test(t, func(*testing.T) {
		err = h.play(script, synctest.Wait)
		played = true
	})
	return err
}

// leftInBubble is the stacks of the goroutines in the newest bubble.
func leftInBubble() string {
	all := make([]byte, 1<<20)
	all = all[:runtime.Stack(all, true)]
	newest, left := 0, ""
	for stack := range strings.SplitSeq(string(all), "\n\n") {
		m := bubbleOf.FindStringSubmatch(stack)
		if m == nil {
			continue
		}
		switch n, _ := strconv.Atoi(m[1]); {
		case n > newest:
			newest, left = n, stack
		case n == newest:
			left += "\n\n" + stack
		}
	}
	return left
}

var bubbleOf = regexp.MustCompile(`^goroutine \d+ \[.*synctest (?:bubble|group) (\d+)\]`)

// call is a step that has begun.
type call struct {
	turn
	token string
	done  chan struct{}

	// Readable when done is closed.
	reply    string
	err      error
	panicked any
	exited   bool // the call ended its goroutine

	reached chan struct{} // closed when the server has read the request, under run.mu
	sent    []byte        // the reply without its fault, guarded by run.mu
}

// run is one script being played.
type run struct {
	h        Harness
	server   *Server
	exchange Exchange
	start    time.Time

	// mu guards the fields below, and what a call says. Nothing blocks under it.
	mu    sync.Mutex
	calls []*call
	log   []string
}

// play plays a script in a bubble or on loopback. settle lets everything that can go on
// without time passing go on; on loopback it does nothing.
func (h Harness) play(script Script, settle func()) (err error) {
	r := &run{h: h, start: time.Now()}
	if h.Loopback {
		if r.server, err = newLoopback(h.Protocol); err != nil {
			return err
		}
		r.server.moment = 2 * time.Millisecond
	} else {
		r.server = newMemory(h.Protocol)
	}
	defer r.awaitAll()
	defer r.server.close()
	r.server.patience, r.server.turnOf, r.server.note = h.patience(), r.turnFor, r.note
	cfg := r.server.Config(h.Config)
	if cfg.MaxPerAddr == 0 {
		cfg.MaxPerAddr = 2
	}
	pool, err := connpool.New(cfg)
	if err != nil {
		return err
	}
	defer pool.Close()
	exchange, end := h.Client(pool, r.server.Addr())
	r.exchange = exchange

	failed := r.playSteps(script, settle)
	if end != nil {
		end()
	}
	if failed == nil {
		if out := returned(pool, grace); out != "" {
			failed = &Failure{Kind: NotReturned, Text: "a connection was not given back: when every exchange had returned, " + out, Step: -1}
		}
	}
	if failed != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		failed.Script, failed.Log = script, slices.Clone(r.log)
		return failed
	}
	return nil
}

// playSteps makes the exchanges of a script, up to the first that fails.
func (r *run) playSteps(script Script, settle func()) *Failure {
	var under []*call // begun and not judged
	// judge takes the calls that are over from under.
	judge := func() (failed *Failure) {
		under = slices.DeleteFunc(under, func(c *call) bool {
			if failed != nil || !c.isDone() {
				return false
			}
			failed = r.judge(c)
			return true
		})
		return failed
	}
	// await waits until at most n calls are under way, or c, if it is not nil, is over.
	await := func(n int, c *call) *Failure {
		for {
			if f := judge(); f != nil || len(under) <= n || c != nil && c.isDone() {
				return f
			}
			next := under[0]
			if c != nil {
				next = c
			}
			if !next.wait(r.h.patience() + grace) {
				return r.failure(next, Stuck, "step %d (%v) has not returned a minute after the end of its ctx", next.number, next.step)
			}
		}
	}
	for i, step := range script {
		most := r.h.borrowers() - 1
		if step.Fault.isBetween() {
			most = 0
		}
		if f := await(most, nil); f != nil {
			return f
		}
		settle()
		r.between(i, step)
		settle()
		c := r.begin(i, step)
		under = append(under, c)
		if !step.Overlap {
			if f := await(0, c); f != nil {
				return f
			}
		} else if r.h.Loopback {
			r.awaitRequest(c)
		}
		settle()
	}
	return await(0, nil)
}

// awaitAll waits until every call has returned, after the server and the pool are closed.
// The time in a bubble stands still when the goroutine that plays the script is gone.
func (r *run) awaitAll() {
	d := 1000 * time.Hour
	if r.h.Loopback {
		d = grace
	}
	for _, c := range r.calls {
		c.wait(d)
	}
}

// between does what a step does before its exchange.
func (r *run) between(i int, step Step) {
	var what string
	switch step.Fault {
	case CutIdle:
		what = fmt.Sprintf("the server closes what is idle: %d", r.server.CutIdle())
	case Unasked:
		what = fmt.Sprintf("the server sends a frame on what is idle: %d", r.server.SendUnasked())
	case Refuse:
		r.server.FailNextDial(1, nil)
		what = "the next dial will fail"
	case HangUp:
		r.server.HangUpNext(1)
		what = "the server will close the next connection"
	default:
		return
	}
	r.note(&turn{number: i}, "%s", what)
	if r.h.Loopback {
		r.server.pause() // the kernel may take its time
	}
}

// begin starts the exchange of a step.
func (r *run) begin(i int, step Step) *call {
	ctx, cancel := context.WithTimeout(context.Background(), r.h.patience())
	c := &call{turn: turn{step: step, number: i, cancel: cancel}, token: tokenOf(r.h.Seed, i), done: make(chan struct{}), reached: make(chan struct{})}
	c.givenUp = c.done
	r.mu.Lock()
	r.calls = append(r.calls, c)
	r.mu.Unlock()
	r.note(&c.turn, "%v: a borrower asks for %s", step, c.token)
	go func() {
		defer close(c.done)
		defer cancel()
		c.exited = true
		defer func() {
			if c.panicked = recover(); c.panicked != nil {
				c.exited = false
			}
			r.noteResult(c)
		}()
		c.reply, c.err = r.exchange(ctx, c.token)
		c.exited = false
	}()
	return c
}

func (r *run) noteResult(c *call) {
	switch {
	case c.panicked != nil:
		r.note(&c.turn, "the call panics: %v", c.panicked)
	case c.exited:
		r.note(&c.turn, "the call ends its goroutine")
	case c.err != nil:
		r.note(&c.turn, "the call fails: %v", c.err)
	default:
		r.note(&c.turn, "the call returns %q", c.reply)
	}
}

// awaitRequest gives the request of c the time to reach the server, so that on loopback,
// too, requests arrive in the order of their steps as a rule.
func (r *run) awaitRequest(c *call) {
	timer := time.NewTimer(10 * r.server.moment)
	defer timer.Stop()
	select {
	case <-c.reached:
	case <-c.done:
	case <-timer.C: // it waits for a connection
	}
}

func (c *call) isDone() bool { return isClosed(c.done) }

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// wait waits for the end of the call, for d at most.
func (c *call) wait(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-c.done:
		return true
	case <-timer.C:
		return false
	}
}

// tokenOf is the token of a step: t, the number of the step, and four letters, so that
// no token is a part of another.
func tokenOf(seed uint64, i int) string {
	x := (seed + uint64(i) + 1) * 0x9e3779b97f4a7c15
	letters := make([]byte, 4)
	for k := range letters {
		letters[k] = 'a' + byte(x>>(56-8*k))%26
	}
	return fmt.Sprintf("t%03d%s", i, letters)
}

// turnFor is Server.turnOf: the fault of a step is for the first request with its token.
func (r *run) turnFor(request []byte) *turn {
	token := string(tokenPattern.Find(request))
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.calls {
		if c.token != token {
			continue
		}
		if isClosed(c.reached) {
			break // a client that tries again
		}
		close(c.reached)
		c.sent = r.h.Protocol.Reply(request)
		return &c.turn
	}
	return &turn{number: -1}
}

// note writes a line of the log.
func (r *run) note(t *turn, format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	who := "      "
	if t != nil && t.number >= 0 {
		who = fmt.Sprintf("step %d", t.number)
	}
	at := time.Since(r.start).Round(time.Microsecond)
	r.log = append(r.log, fmt.Sprintf("%8v  %s  %s", at, who, fmt.Sprintf(format, args...)))
}
