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

// A server that speaks first sends bytes that nobody asked for: a greeting, a banner,
// "max number of clients reached". Where replies are matched to requests by position,
// such bytes are taken for the reply to the first request, that reply for the reply to
// the second request, and so on: each client gets the reply that another one asked for.
//
// Listening before a request is not enough, since a greeting may come later, even between
// a request and its reply. So the gateway counts replies, and passes a reply to its
// client only when it has evidence that there is not one reply too many:
//
//	line, length  The gateway does not know the words of these protocols, so only
//	              time can tell. See greetings.
//	resp          The gateway sends a PING with a number after the requests. The
//	              reply to it has the number and proves the replies before it. See
//	              hello and mark.
//	modbus        Each reply has the number of its request.
//	session       Nothing is shared; the server may speak first.
//
// If the count is wrong, the pool closes the connection before any of it reaches a
// client, and the gateway opens new connections ever more rarely until one is good.

// speaksFirst means that the server sent something before it was asked.
type speaksFirst struct {
	framing string
	said    []byte // the beginning of what it sent
}

func (e *speaksFirst) Error() string {
	if len(e.said) == 0 {
		return "the server speaks first: something came without a request, and the framing " + e.framing + " would take it for a reply; use the framing session"
	}
	return fmt.Sprintf("the server speaks first: %s came without a request, and the framing %s would take it for a reply; use the framing session",
		strconv.Quote(string(e.said)), e.framing)
}

// errSilent is the good outcome of listening: nothing came. The borrower returns
// connpool.Keep(errSilent), because the read was meant to time out.
var errSilent = errors.New("nothing came, as it should be")

// errHungUp means that the server ended a connection on which nothing was asked.
var errHungUp = errors.New("the server ended the connection before it was asked anything")

// unasked listens until end on a connection with no request in flight. It returns nil if
// the connection stayed silent. Otherwise it returns *speaksFirst, errHungUp, or another
// error of the connection (such as a TLS alert), which is then useless. The borrower of a
// connection that stayed silent returns connpool.Keep.
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

// On a new connection to a server that is known to be silent, the gateway listens for
// quickLook before the first request. After the first reply it listens for the same time,
// or for twice the longest exchange so far, up to longestLook.
const (
	quickLook   = 50 * time.Millisecond
	longestLook = 250 * time.Millisecond
)

// greetings is what the gateway knows about whether the server speaks first. It begins as
// unknown:
//
//	         a connection has been silent, but for replies, for wait
//	unknown -------------------------------------------> silent
//	   ^                                                   |
//	   +----------------- something came unasked ----------+
//
// In state unknown, the gateway listens to a new connection for a third of wait before
// the first request (for all of wait, if something came unasked before). It passes no
// reply to a client before the connection has been silent for wait (and not before wait
// has passed since the reply, if something came unasked before). For a time of wait after
// the state has become silent, each reply is still held until another one would have had
// time to follow it. The first replies of each new connection are always held in this
// way.
type greetings struct {
	wait    time.Duration // not positive: the gateway does not listen
	quick   time.Duration // quickLook, or less if quickLook is long compared with wait
	framing string
	once    bool // each connection has one exchange: nothing follows its first reply
	log     *slog.Logger

	mu      sync.Mutex    // guards the fields below; nothing else happens under it
	silent  time.Time     // since when the state is silent; zero: it is unknown
	last    error         // what was wrong with a new connection, until a younger one is good
	at      time.Time     // when last was set
	until   time.Time     // when the next connection may be opened
	pause   time.Duration // from at to until
	told    time.Time     // when last was logged
	slowest time.Duration // the longest exchange after which the gateway listened
	bare    bool          // resp: the server hangs up on a PING with a number
	hungUp  time.Time     // resp: when it first did so, and no connection has been proven since; zero: it did not
}

const (
	firstPause    = 250 * time.Millisecond
	longestPause  = time.Second     // before reconnecting to a server that is full or refuses us
	longestSilent = 5 * time.Second // before reconnecting to a server that speaks first
	tellEvery     = time.Minute
)

// surprised records that something came unasked, and returns e.
func (k *greetings) surprised(e *speaksFirst) error {
	k.bad(e, longestSilent)
	return e
}

// bad records that a new connection was no good, and delays the next one.
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

// refusing returns why no new connection may be opened now; nil: one may be opened.
func (k *greetings) refusing() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.last != nil && time.Now().Before(k.until) {
		return k.last
	}
	return nil
}

// speaking reports whether the latest finding is that the server speaks first.
func (k *greetings) speaking() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	var first *speaksFirst
	return errors.As(k.last, &first)
}

// forget sets the state to unknown: another server may have taken over the address.
func (k *greetings) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.silent, k.last, k.pause = time.Time{}, nil, 0
	k.bare, k.hungUp = false, time.Time{}
}

// hangsUp records that a server hung up on a PING with a number, on a connection whose
// hello began at began. Any server may end a connection at any moment, so only a second
// hang-up counts as evidence that the server does not know such a PING.
func (k *greetings) hangsUp(began time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	again := !k.hungUp.IsZero() && began.After(k.hungUp)
	k.bare = k.bare || again
	if k.hungUp.IsZero() {
		k.hungUp = time.Now()
	}
}

// proved records that a server has answered a PING with its number.
func (k *greetings) proved() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hungUp = time.Time{}
}

// found records that a connection was silent, but for replies, until now.
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

// before listens on a connection that has carried no request yet, until latest at most.
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

// after listens on a connection whose requests have all been answered. asked is when the
// first of them was sent. If after returns no error, the replies may be passed on.
func (k *greetings) after(c net.Conn, u *replies, asked, latest time.Time) error {
	if k.wait <= 0 || u.settled {
		return nil
	}
	now := time.Now()
	k.mu.Lock()
	k.slowest = max(k.slowest, now.Sub(asked))
	known, hold := k.silent, max(k.quick, min(2*k.slowest, k.wait))
	var first *speaksFirst
	if errors.As(k.last, &first) { // such a server may send its greeting only after a request
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
	case now.Sub(known) < k.wait: // known only for a short time
	case k.once: // the connection is not lent again, so later bytes harm nobody
		u.settled = true
		return nil
	default:
		end, settles = now.Add(min(hold, max(k.quick, longestLook))), true
	}
	err := k.listen(c, u, earlier(end, latest))
	switch {
	case err == errHungUp, // all replies are there, and no more can come
		err != nil && !errors.As(err, &first) && !known.IsZero():
		return nil
	case err != nil:
		return err
	}
	u.settled = settles
	k.found(u)
	return nil
}

// listen calls unasked for a lent connection and its codec.
func (k *greetings) listen(c net.Conn, u *replies, end time.Time) error {
	if n := u.Buffered(); n > 0 {
		return k.surprised(&speaksFirst{k.framing, bytes.Clone(u.buf[u.r:min(u.w, u.r+64)])})
	}
	if !time.Now().Before(end) {
		end = time.Now().Add(time.Millisecond) // listens for a moment all the same
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

// refusedPing is the reply to PING of a server that does not serve us.
type refusedPing struct{ line string }

func (e *refusedPing) Error() string {
	return fmt.Sprintf("the server answers PING with %s", strconv.Quote(e.line))
}

// tolerable are the errors that a server may send in reply to PING although it works, or
// will work soon.
var tolerable = []string{"-NOAUTH", "-NOPERM", "-LOADING", "-MISCONF", "-BUSY ", "-MASTERDOWN", "-CLUSTERDOWN", "-NOREPLICAS",
	"-ERR operation not permitted", "-ERR unknown command", "-ERR wrong number of arguments"}

// hello sends PING on a new connection, logs the connection in as the identity, if there
// is one, and finds out whether the server proves its replies.
func (k *greetings) hello(nc net.Conn, u *replies, id *identity) error {
	ask := func(args ...[]byte) ([]byte, error) {
		if _, err := nc.Write(appendCommand(nil, args...)); err != nil {
			return nil, err
		}
		var reply store
		err := u.reply(nc, &reply)
		var bad *malformed
		if errors.As(err, &bad) { // the reply is no RESP
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
		// The server refuses everything until a client logs in, and a login uses a
		// connection of its own, so no reply can be mistaken for another. A server that
		// does not know PING proves nothing.
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

// hopeless returns why a request need not wait for a connection: the last one opened was
// no good, the next may not be opened yet, and the pool has none. nil: the request may
// wait.
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

// nothingMore refuses a connection on which more bytes came than were asked for.
func (k *greetings) nothingMore(u *replies) error {
	if u.Buffered() > 0 {
		return k.surprised(&speaksFirst{k.framing, bytes.Clone(u.buf[u.r:min(u.w, u.r+64)])})
	}
	return nil
}

// nextMark returns the argument of the next PING, which proves the replies before its
// own. Clients do not know the argument.
func (u *replies) nextMark() []byte {
	u.tid++
	return strconv.AppendUint(bytes.Clone(u.token), uint64(u.tid), 10)
}

func (u *replies) isMark(reply []byte) bool {
	word := strconv.AppendUint(bytes.Clone(u.token), uint64(u.tid), 10)
	want := append(append(fmt.Appendf(nil, "$%d\r\n", len(word)), word...), "\r\n"...)
	return bytes.Equal(bare(reply), want)
}

// mark returns the command to send after the requests of a connection that is not
// settled; nil if there is none.
func (k *greetings) mark(u *replies) []byte {
	if k.wait <= 0 || u.settled || !u.proves {
		return nil
	}
	return appendCommand(nil, []byte("PING"), u.nextMark())
}

// marked reads the reply to mark. Like after, it returns no error if the replies before
// it may be passed on. A server that is busy, is loading or has lost its master refuses
// PING too, and then marked calls after.
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
	if time.Since(u.born) >= 2*k.wait { // and no loan since has ended without proof
		u.settled = true
	}
	k.found(u)
	return nil
}

// --- new connections ---

// pauseFor waits for d, or until ctx is done.
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

// setup makes the codec of a new connection to the server. For resp it also checks the
// server with PING before a client's request uses the connection.
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
		u.tid = uint16(rand.IntN(1<<15) + 1<<8) // a number that a server which speaks first cannot guess
		u.settled = true
	}
	return u, nil
}
