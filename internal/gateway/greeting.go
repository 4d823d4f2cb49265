package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// A server that speaks first says something that nobody asked for: a greeting, a
// banner, "max number of clients reached". Where replies are matched by position
// such a word is taken for the reply to the first request, that reply for the
// one to the second request, and so on: each client reads what another one asked.
//
// No look before a request is enough, since a greeting may come later, even
// between a request and its reply. So the gateway counts, and lets a reply reach
// its client only when it has reason to believe that there is not one too many:
//
//	line, length  The words of these protocols are unknown: only time can tell.
//	              See greetings.
//	resp          A PING with a number is asked after the requests, and its
//	              answer, which has the number, proves what came before it. See
//	              hello and mark.
//	modbus        Each reply has the number of its request.
//	session       Nothing is shared; the server may speak first.
//
// What does not add up costs the connection before any of it reaches a client,
// and new connections are tried ever more rarely until one is found good.

// speaksFirst is that the server said something before it was asked.
type speaksFirst struct {
	framing string
	said    []byte // the beginning of it
}

func (e *speaksFirst) Error() string {
	if len(e.said) == 0 {
		return "the server speaks first: something came without a request, and the framing " + e.framing + " would take it for a reply; use the framing session"
	}
	return fmt.Sprintf("the server speaks first: %s came without a request, and the framing %s would take it for a reply; use the framing session",
		strconv.Quote(string(e.said)), e.framing)
}

// errSilent is the good outcome of a look that waited in vain. It is given back
// as connpool.Keep(errSilent), since a read that timed out was meant to.
var errSilent = errors.New("nothing came, as it should be")

// errHungUp is that the server ended a connection on which nothing was asked.
var errHungUp = errors.New("the server ended the connection before it was asked anything")

// unasked listens until end to a connection on which no request is under way.
// nil means that it stayed silent. Otherwise the error is *speaksFirst,
// errHungUp, or what else befell the connection (an alert of TLS), which is of no
// more use. A lent connection that stayed silent is given back with
// connpool.Keep.
func unasked(c net.Conn, framing string, end time.Time) error {
	if err := c.SetReadDeadline(end); err != nil {
		return err
	}
	said := make([]byte, 64)
	n, err := c.Read(said)
	switch {
	case n > 0:
		return &speaksFirst{framing, said[:n]}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return c.SetReadDeadline(time.Time{})
	case err == io.EOF:
		return errHungUp
	case err == nil:
		return io.ErrNoProgress
	}
	return err
}

// A new connection to a server that is known to be silent is listened to for
// quickLook before its first request. After its first reply it is listened to for
// as long, or for twice the longest exchange so far, up to longestLook.
const (
	quickLook   = 50 * time.Millisecond
	longestLook = 250 * time.Millisecond
)

// greetings is what is known of whether the server speaks first. It begins
// unknown:
//
//	         a connection has been silent, but for replies, for wait
//	unknown -------------------------------------------> silent
//	   ^                                                   |
//	   +----------------- something came unasked ----------+
//
// While it is unknown, a new connection is listened to for a third of wait
// (for all of it, if something came unasked before) before it carries a request,
// and no reply reaches a client before its connection has been silent for wait
// (and before wait has passed since the reply, if something came unasked before).
// When it has just become known, each reply is still held until it has had the
// time to be followed by another one; so are the first ones of each new
// connection for ever.
type greetings struct {
	wait    time.Duration // not positive: nobody listens
	quick   time.Duration // quickLook, or less if that is long beside wait
	framing string
	once    bool // connections have one exchange each: nothing follows the first reply
	log     *slog.Logger

	mu      sync.Mutex    // guards what follows; nothing else happens under it
	silent  time.Time     // since when it is known; zero: it is not
	last    error         // what was wrong with a new connection, until a younger one is found good
	at      time.Time     // of it
	until   time.Time     // when the next connection may be tried
	pause   time.Duration // from at to until
	told    time.Time     // when the log was told
	slowest time.Duration // the longest exchange so far that was listened to
	bare    bool          // resp: the server hangs up on a PING with a number
	hungUp  time.Time     // ... when it did so first, and no connection has been proven since; zero: it did not
}

const (
	firstPause    = 250 * time.Millisecond
	longestPause  = time.Second     // before one that is full, or will not work for us, is tried again
	longestSilent = 5 * time.Second // before one that speaks first is
	tellEvery     = time.Minute
)

// surprised books that something came unasked, and returns it.
func (k *greetings) surprised(e *speaksFirst) error {
	k.bad(e, longestSilent)
	return e
}

// bad books that a new connection was no good, and lets nobody open another one
// for a while.
func (k *greetings) bad(e error, longest time.Duration) {
	now := time.Now()
	k.mu.Lock()
	k.last, k.at = e, now
	var first *speaksFirst
	if errors.As(e, &first) {
		k.silent = time.Time{}
	}
	k.pause = min(max(2*k.pause, firstPause), longest)
	k.until = now.Add(k.pause)
	tell := now.Sub(k.told) >= tellEvery
	if tell {
		k.told = now
	}
	k.mu.Unlock()
	if tell {
		k.log.Error("requests are refused", "error", e)
	}
}

// refusing is why no new connection may be tried now; nil: one may be.
func (k *greetings) refusing() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.last != nil && time.Now().Before(k.until) {
		return k.last
	}
	return nil
}

// speaking reports whether the last that is known of the server is that it
// speaks first.
func (k *greetings) speaking() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	var first *speaksFirst
	return errors.As(k.last, &first)
}

// forget makes it unknown again: another server may be there.
func (k *greetings) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.silent, k.last, k.pause = time.Time{}, nil, 0
	k.bare, k.hungUp = false, time.Time{}
}

// hangsUp books that a server hung up on a PING with a number, on a connection
// that was asked since began. Any server may end at any moment: only one that
// does so again is taken to know no such PING.
func (k *greetings) hangsUp(began time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	again := !k.hungUp.IsZero() && began.After(k.hungUp)
	k.bare = k.bare || again
	if k.hungUp.IsZero() {
		k.hungUp = time.Now()
	}
}

// proved books that a server has answered a PING with its number.
func (k *greetings) proved() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hungUp = time.Time{}
}

// found books that a connection was silent, but for replies, until now.
func (k *greetings) found(u *replies) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	if k.last != nil && u.born.After(k.at) {
		var first *speaksFirst
		if errors.As(k.last, &first) && now.Sub(u.born) < k.wait {
			return
		}
		k.last, k.pause = nil, 0
	}
	if now.Sub(u.born) < k.wait || k.last != nil {
		return
	}
	if k.silent.IsZero() {
		k.silent = now
	}
}

// before listens to a connection that has carried no request yet. It does so
// until latest at most.
func (k *greetings) before(c net.Conn, u *replies, latest time.Time) error {
	if k.wait <= 0 || u.settled || u.heard || u.proves {
		return nil
	}
	k.mu.Lock()
	end := u.born.Add(k.wait / 3)
	var first *speaksFirst
	switch {
	case errors.As(k.last, &first):
		end = u.born.Add(k.wait)
	case !k.silent.IsZero():
		end = u.born.Add(k.quick)
	}
	k.mu.Unlock()
	if err := k.listen(c, u, earlier(end, latest)); err != nil {
		return err
	}
	u.heard = true
	return nil
}

// after listens to a connection whose requests have all been answered, the
// first of them asked at the time asked. Only then may the replies be believed.
func (k *greetings) after(c net.Conn, u *replies, asked, latest time.Time) error {
	if k.wait <= 0 || u.settled {
		return nil
	}
	now := time.Now()
	k.mu.Lock()
	k.slowest = max(k.slowest, now.Sub(asked))
	known, hold := k.silent, max(k.quick, min(2*k.slowest, k.wait))
	var first *speaksFirst
	if errors.As(k.last, &first) { // it may greet those who ask
		hold = k.wait
	}
	k.mu.Unlock()
	end := now.Add(hold)
	settles := false
	switch {
	case known.IsZero(): // unknown
		if old := u.born.Add(k.wait); end.Before(old) {
			end = old
		}
	case now.Sub(known) < k.wait: // known for a short time
	case k.once: // nothing is lent again that a late word could spoil
		u.settled = true
		return nil
	default:
		end, settles = now.Add(min(hold, max(k.quick, longestLook))), true
	}
	err := k.listen(c, u, earlier(end, latest))
	switch {
	case err == errHungUp, // all replies are there, and no more
		err != nil && !errors.As(err, &first) && !known.IsZero():
		return nil
	case err != nil:
		return err
	}
	u.settled = settles
	k.found(u)
	return nil
}

// listen is unasked for a lent connection with its codec.
func (k *greetings) listen(c net.Conn, u *replies, end time.Time) error {
	if n := u.Buffered(); n > 0 {
		return k.surprised(&speaksFirst{k.framing, bytes.Clone(u.buf[u.r:min(u.w, u.r+64)])})
	}
	if !time.Now().Before(end) {
		end = time.Now().Add(time.Millisecond) // a look all the same
	}
	u.listened = true
	err := unasked(c, k.framing, end)
	var first *speaksFirst
	switch {
	case errors.As(err, &first):
		return k.surprised(first)
	case err == errHungUp && !u.heard:
		k.bad(err, longestPause)
	}
	return err
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// --- resp ---

// refusedPing is an answer to PING of a server that will not work for us.
type refusedPing struct{ line string }

func (e *refusedPing) Error() string {
	return fmt.Sprintf("the server answers PING with %s", strconv.Quote(e.line))
}

// tolerable are the errors with which a server may answer PING that works all
// the same, or will.
var tolerable = []string{"-NOAUTH", "-NOPERM", "-LOADING", "-MISCONF", "-BUSY ", "-MASTERDOWN", "-CLUSTERDOWN", "-NOREPLICAS",
	"-ERR operation not permitted", "-ERR unknown command", "-ERR wrong number of arguments"}

// hello asks PING on a new connection, makes it that of the identity, if there
// is one, and finds out whether the server proves its answers.
func (k *greetings) hello(nc net.Conn, u *replies, id *identity) error {
	ask := func(args ...[]byte) ([]byte, error) {
		if _, err := nc.Write(appendCommand(nil, args...)); err != nil {
			return nil, err
		}
		var reply store
		err := u.reply(nc, &reply)
		var bad *malformed
		if errors.As(err, &bad) { // no word of RESP
			err = k.surprised(&speaksFirst{k.framing, bytes.Clone(u.buf[:min(u.w, 64)])})
		}
		return reply.b, err
	}
	began := time.Now()
	reply, err := ask([]byte("PING"))
	if err != nil {
		return err
	}
	answers := !isError(reply)
	if !answers && !isTolerable(reply) {
		err := &refusedPing{string(reply)}
		k.bad(err, longestPause)
		return err
	}
	if id != nil {
		if err := id.assume(nc, u); err != nil {
			return err
		}
	}
	u.born = time.Now()
	switch {
	case !answers && (id == nil || !id.auth):
		// It says no to everything until a client logs in, on a connection of its
		// own: there is nothing that could be mistaken for something else. A
		// server that does not know PING proves nothing.
		u.settled = !hasPrefix(reply, "-ERR unknown command")
		return k.nothingMore(u)
	case answers && string(reply) != "+PONG\r\n", k.isBare():
		return k.nothingMore(u) // only time can tell
	}
	u.token = fmt.Appendf(nil, "connpool:%016x:", rand.Uint64())
	reply, err = ask([]byte("PING"), u.nextMark())
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		k.hangsUp(began)
		return err
	case err != nil:
		return err
	case u.isMark(reply):
		u.proves = true
		k.proved()
	case !isError(reply) && string(reply) != "+PONG\r\n":
		return k.surprised(&speaksFirst{k.framing, reply[:min(len(reply), 64)]})
	}
	return k.nothingMore(u)
}

// hopeless is why a request need not wait for a connection: the last one that
// was opened was no good, it is too early for the next, and there is no other.
func (g *Gateway) hopeless() error {
	err := g.greet.refusing()
	if err != nil {
		if st := g.pool.Stats(); st.Idle+st.InUse > 0 {
			return nil
		}
	}
	return err
}

func (k *greetings) isBare() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.bare
}

func isTolerable(reply []byte) bool {
	for _, prefix := range tolerable {
		if hasPrefix(reply, prefix) {
			return true
		}
	}
	return false
}

// nothingMore refuses a connection on which there is more than was asked for.
func (k *greetings) nothingMore(u *replies) error {
	if u.Buffered() > 0 {
		return k.surprised(&speaksFirst{k.framing, bytes.Clone(u.buf[u.r:min(u.w, u.r+64)])})
	}
	return nil
}

// nextMark is the word of the next PING that proves what was answered before it.
// It is not known to clients.
func (u *replies) nextMark() []byte {
	u.tid++
	return strconv.AppendUint(bytes.Clone(u.token), uint64(u.tid), 10)
}

func (u *replies) isMark(reply []byte) bool {
	word := strconv.AppendUint(bytes.Clone(u.token), uint64(u.tid), 10)
	want := append(append(fmt.Appendf(nil, "$%d\r\n", len(word)), word...), "\r\n"...)
	return bytes.Equal(bare(reply), want)
}

// mark is the command that is sent after the requests of a connection that is
// not settled, nil if there is none.
func (k *greetings) mark(u *replies) []byte {
	if k.wait <= 0 || u.settled || !u.proves {
		return nil
	}
	return appendCommand(nil, []byte("PING"), u.nextMark())
}

// marked reads the answer to mark, as after listens: the replies before it may be
// believed if there is no error. A server that is busy, loads or has lost its
// master refuses PING too, and then only time can tell.
func (k *greetings) marked(c net.Conn, u *replies, asked, latest time.Time) error {
	var reply store
	if err := u.reply(c, &reply); err != nil {
		return err
	}
	if isError(reply.b) && isTolerable(reply.b) {
		return k.after(c, u, asked, latest)
	}
	if !u.isMark(reply.b) {
		return k.surprised(&speaksFirst{k.framing, reply.b[:min(len(reply.b), 64)]})
	}
	if time.Since(u.born) >= 2*k.wait { // and it was not lent unproven since
		u.settled = true
	}
	k.found(u)
	return nil
}

// --- new connections ---

// pauseFor waits for d, or for ctx.
func pauseFor(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// setup makes the codec of a new connection to the server, and asks the server
// what can be asked before a client's request goes over it.
func (g *Gateway) setup(ctx context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
	if err := pauseFor(ctx, g.ConnectDelay); err != nil {
		return nil, err
	}
	var closed func()
	if g.RedialDelay > 0 {
		closed = g.redial.closed
	}
	if g.framing.newReplies == nil {
		if closed == nil {
			return nil, nil
		}
		return &replies{closed: closed}, nil
	}
	if err := g.greet.refusing(); err != nil {
		return nil, err
	}
	u := &replies{sc: g.framing.newReplies(&g.Config), max: g.MaxFrame, born: time.Now(), closed: closed}
	switch g.framing.name {
	case "resp":
		u.pushes = true
		id, _ := ctx.Value(identityKey{}).(*identity)
		return u, g.greet.hello(nc, u, id)
	case "modbus":
		u.tid = uint16(rand.IntN(1<<15) + 1<<8) // not known to whoever would speak first
		u.settled = true
	}
	return u, nil
}
