package connpool

import (
	"log/slog"
	"runtime/pprof"
	"sync"
	"time"

	"github.com/seed-ecb488c9/connpool/internal/clock"
)

// Leak detection and reports of long loans. A loan record says who has a connection
// that is in use, and since when: for a single loan, for a lease, or for all the uses
// of a session. A record takes a walk up the stack, so the pool makes records only if
// HoldWarn, Profile or Debug is set. Leases are always recorded: when a lease leaks,
// the stack of its borrow is the only thing that the pool can report. But without these
// settings the record of a lease has only the innermost calls of the stack.

// maxCalls is how many calls of the stack a record has, and fewCalls how many the record of a
// lease has that nothing but a leak will report.
const (
	maxCalls = 64
	fewCalls = 4
)

// loanRecord is the record of one connection that is in use. Records are used again and
// again: without mu of the loanLog, only the owner of the connection may look at one.
type loanRecord struct {
	addr  Addr
	id    uint64
	since clock.Instant
	trace *Trace // of the borrow, including the pool's
	calls int    // how many of pcs are set
	pcs   [maxCalls]uintptr

	next, prev *loanRecord // in the list of the loanLog
}

var loanRecords = sync.Pool{New: func() any { return new(loanRecord) }}

// stack returns the calls of the borrow, innermost first, as a part of h.
func (h *loanRecord) stack() callers { return callers(h.pcs[:h.calls]) }

// loanLog holds the loan records, and reports connections that have been in use for
// long.
type loanLog struct {
	wanted  bool           // every loan is recorded, not only leases
	warn    time.Duration  // Config.HoldWarn; 0 or less: no reports
	profile *pprof.Profile // nil: none
	clock   *clock.Clock
	report  *reporter

	// All records, the longest loan first. The timer runs while there are any that have not
	// been reported.
	mu             sync.Mutex // guards what follows; no hook, log line or other lock under it
	oldest, newest *loanRecord
	untold         *loanRecord // the first that has not been reported; nil if there is none, or without reports
	timer          *time.Timer
}

// init sets up the log from the pool's Config.
func (l *loanLog) init(cfg *Config, k *clock.Clock, r *reporter) {
	l.wanted = cfg.HoldWarn > 0 || cfg.Profile != nil || cfg.Debug
	l.warn, l.profile, l.clock, l.report = cfg.HoldWarn, cfg.Profile, k, r
}

// extent is how many calls of the stack a record is to have that begins now, and the time of its
// begin. Of a lease that nothing but a leak will report, a tick does not matter.
func (l *loanLog) extent() (calls int, now clock.Instant) {
	if l.wanted {
		return maxCalls, l.clock.Exactly()
	}
	return fewCalls, l.clock.Now()
}

// add adds a record. skip is the number of stack frames to leave out for the Profile.
func (l *loanLog) add(h *loanRecord, skip int) {
	l.mu.Lock()
	h.prev, h.next = l.newest, nil
	if l.newest = h; h.prev != nil {
		h.prev.next = h
	} else {
		l.oldest = h
	}
	if l.warn > 0 && l.untold == nil {
		l.untold = h
		if l.timer == nil {
			l.timer = time.AfterFunc(l.warn, l.tell)
		} else {
			l.timer.Reset(l.warn)
		}
	}
	l.mu.Unlock()
	if l.profile != nil {
		l.profile.Add(h, skip+1) // last, because it may panic
	}
}

// remove removes a record. The caller must not use it any more.
func (l *loanLog) remove(h *loanRecord) {
	if l.profile != nil {
		l.profile.Remove(h)
	}
	l.mu.Lock()
	if l.untold == h {
		if l.untold = h.next; l.untold == nil {
			l.timer.Stop()
		}
	}
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
	l.mu.Unlock()
	h.addr, h.trace, h.next, h.prev = Addr{}, nil, nil, nil
	loanRecords.Put(h)
}

// tell reports each connection that has been in use for HoldWarn, once, and restarts
// the timer for the next one.
func (l *loanLog) tell() {
	now := l.clock.Exactly()
	var late []loanRecord // copies: a loan may end while its record is told
	l.mu.Lock()
	for ; l.untold != nil; l.untold = l.untold.next {
		if left := l.warn - now.Sub(l.untold.since); left > 0 {
			l.timer.Reset(max(left, time.Millisecond))
			break
		}
		late = append(late, *l.untold)
	}
	l.mu.Unlock()
	for i := range late {
		h := &late[i]
		info := h.info(now)
		if h.trace != nil && h.trace.HeldLong != nil {
			l.report.observe("Trace.HeldLong", func() { h.trace.HeldLong(info) })
		}
		l.report.log(slog.LevelWarn, "a connection has been in use for long", "addr", info.Addr, "id", info.ID,
			"held", info.Held, "borrowed at", info.Place)
	}
}

// info returns h as a HeldInfo; the loan has lasted until now.
func (h *loanRecord) info(now clock.Instant) HeldInfo {
	info := HeldInfo{Addr: h.addr, ID: h.id, Held: now.Sub(h.since)}
	info.Place, info.Stack = h.stack().text()
	return info
}

// farEnough bounds the search for the longest loan: making an error must not walk over a
// hundred thousand connections.
const farEnough = 256

// longest returns a copy of the first record whose address satisfies which, among the farEnough
// longest loans. It reports false if there is none.
func (l *loanLog) longest(which func(Addr) bool) (loanRecord, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.oldest
	for n := 0; h != nil && n < farEnough; n++ {
		if which(h.addr) {
			return *h, true
		}
		h = h.next
	}
	return loanRecord{}, false
}

// at returns copies of the records of up to n loans at addr, and counts the others.
func (l *loanLog) at(addr Addr, n int) (hs []loanRecord, more int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for h := l.oldest; h != nil; h = h.next {
		if h.addr != addr {
			continue
		} else if len(hs) < n {
			hs = append(hs, *h)
		} else {
			more++
		}
	}
	return hs, more
}
