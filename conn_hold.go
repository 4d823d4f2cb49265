package connpool

import (
	"container/list"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// A hold is the time a connection is out of the pool: a loan, a lease, or all
// that a session has of it. Who holds what, and since when, is written down
// only if somebody wants to know (HoldWarn, Profile, Debug), because it takes a
// walk up the stack; but for leases always, since of a forgotten one the place
// where it was borrowed is all there is to tell.

// HeldInfo is what [Trace.HeldLong] and [Trace.Leaked] get.
type HeldInfo struct {
	Addr  Addr
	ID    uint64        // of the connection in its pool
	Held  time.Duration // so far
	Place string        // where it was borrowed: a function, its file and line
	Stack string        // the whole stack of the borrow, as in the text of a panic
}

// holding is one connection that is out.
type loanRecord struct {
	addr  Addr
	id    uint64
	since clock.Instant
	stack []uintptr
	trace *Trace // of the borrow, which has the pool's in it

	next, prev *loanRecord // in the list of the loanLog
	listed     bool
	out        *list.Element // in loanLog.out
}

// loanLog knows what is out, as far as that is written down, and tells of what has
// been out for long.
type loanLog struct {
	wanted  bool           // each loan is written down, not only the leases
	warn    time.Duration  // Config.HoldWarn, 0 or less: nothing is told
	profile *pprof.Profile // nil: none
	clock   *clock.Clock
	report  *reporter

	out loansOut // all that is written down

	// Those that have not been told of, longest held first. The timer runs while there
	// are any.
	mu             sync.Mutex // guards the list and the timer; no hook, log line or other lock under it
	oldest, newest *loanRecord
	timer          *time.Timer
}

func (l *loanLog) init(cfg *Config, k *clock.Clock, r *reporter) {
	l.wanted = cfg.HoldWarn > 0 || cfg.Profile != nil || cfg.Debug
	l.warn, l.profile, l.clock, l.report = cfg.HoldWarn, cfg.Profile, k, r
}

// recordLoan writes down that c is lent to the caller's caller, skip frames further
// up. Only the owner of c calls it.
func (c *conn) recordLoan(skip int) {
	p := c.site.pool
	var pcs [64]uintptr
	n := runtime.Callers(skip+2, pcs[:])
	h := &loanRecord{addr: c.site.addr, id: c.id, since: p.clock.Exactly(), stack: append([]uintptr(nil), pcs[:n]...), trace: c.trace()}
	c.loanState().record = h
	p.loanLog.add(h, skip+2)
}

// add begins the record of a loan to the caller, skip frames further up.
func (l *loanLog) add(h *loanRecord, skip int) {
	l.out.add(h)
	if l.profile != nil {
		l.profile.Add(h, skip+1)
	}
	if l.warn <= 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	h.listed, h.prev = true, l.newest
	l.newest = h
	if h.prev != nil {
		h.prev.next = h
		return
	}
	l.oldest = h
	if l.timer == nil {
		l.timer = time.AfterFunc(l.warn, l.tell)
	} else {
		l.timer.Reset(l.warn)
	}
}

// dropRecord ends the record of the loan of c, if there is one. Only the owner of c
// calls it, and is about to give c up.
func (c *conn) dropRecord() {
	if l := c.loan.Load(); l != nil && l.record != nil {
		h := l.record
		l.record = nil
		c.site.pool.loanLog.remove(h)
	}
}

func (l *loanLog) remove(h *loanRecord) {
	l.out.remove(h)
	if l.profile != nil {
		l.profile.Remove(h)
	}
	if l.warn <= 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if h.listed {
		l.unlist(h)
	}
	if l.oldest == nil && l.timer != nil { // else the Profile has panicked, and h never came so far
		l.timer.Stop()
	}
}

// unlist needs mu.
func (l *loanLog) unlist(h *loanRecord) {
	if h.prev == nil {
		l.oldest = h.next
	} else {
		h.prev.next = h.next
	}
	if h.next == nil {
		l.newest = h.prev
	} else {
		h.next.prev = h.prev
	}
	h.prev, h.next, h.listed = nil, nil, false
}

// tell tells of each connection that has been out for HoldWarn, once.
func (l *loanLog) tell() {
	now := l.clock.Exactly()
	var late []*loanRecord
	l.mu.Lock()
	for h := l.oldest; h != nil; h = l.oldest {
		left := l.warn - now.Sub(h.since)
		if left > 0 {
			l.timer.Reset(max(left, time.Millisecond))
			break
		}
		l.unlist(h)
		late = append(late, h)
	}
	l.mu.Unlock()
	for _, h := range late {
		info := h.info(now)
		if h.trace != nil && h.trace.HeldLong != nil {
			l.report.observe("Trace.HeldLong", func() { h.trace.HeldLong(info) })
		}
		l.report.log(slog.LevelWarn, "a connection has been in use for long", "addr", info.Addr, "id", info.ID,
			"held", info.Held, "borrowed at", info.Place)
	}
}

func (h *loanRecord) info(now clock.Instant) HeldInfo {
	info := HeldInfo{Addr: h.addr, ID: h.id, Held: now.Sub(h.since)}
	var b strings.Builder
	frames := runtime.CallersFrames(h.stack)
	for more := len(h.stack) > 0; more; {
		var f runtime.Frame
		f, more = frames.Next()
		if info.Place == "" {
			info.Place = fmt.Sprintf("%s (%s:%d)", f.Function, f.File, f.Line)
		}
		fmt.Fprintf(&b, "%s\n\t%s:%d\n", f.Function, f.File, f.Line)
	}
	info.Stack = b.String()
	return info
}

// forgotten takes back the connection of a lease or session that nobody can
// reach any more.
func leakedLease(c *conn) {
	go func() { // the caller is the runtime, and its other clean-ups wait
		if c.abort() {
			c.noteLeaked()
		}
	}()
}

// leaked closes a connection that the caller owns because nobody else can.
func (c *conn) noteLeaked() {
	p := c.site.pool
	t, h := c.trace(), c.loanState().record
	if h == nil { // nobody wanted to know; only leases are always written down
		h = &loanRecord{addr: c.site.addr, id: c.id, since: c.since}
	}
	info := h.info(p.clock.Exactly())
	p.mu.Lock()
	p.counts.Leaked++
	p.mu.Unlock()
	c.discard(ClosedLeaked, nil)
	if t != nil && t.Leaked != nil {
		p.report.observe("Trace.Leaked", func() { t.Leaked(info) })
	}
	p.report.log(slog.LevelError, "a lease or session was forgotten; its connection is closed", "addr", info.Addr, "id", info.ID,
		"held", info.Held, "borrowed by", info.Stack)
}
