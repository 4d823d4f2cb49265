package connpool

import (
	"container/list"
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
// the stack of its borrow is the only thing that the pool can report.

// loanRecord is the record of one connection that is in use.
type loanRecord struct {
	addr  Addr
	id    uint64
	since clock.Instant
	stack callers
	trace *Trace // of the borrow, including the pool's

	next, prev *loanRecord   // in the list of the loanLog
	listed     bool          // it is in that list
	out        *list.Element // in loanLog.out
}

// loanLog holds the loan records, and reports connections that have been in use for
// long.
type loanLog struct {
	wanted  bool           // every loan is recorded, not only leases
	warn    time.Duration  // Config.HoldWarn; 0 or less: no reports
	profile *pprof.Profile // nil: none
	clock   *clock.Clock
	report  *reporter

	out loansOut // all records

	// The records that have not been reported yet, oldest first. The timer runs while
	// there are any.
	mu             sync.Mutex // guards the list and the timer; no hook, log line or other lock under it
	oldest, newest *loanRecord
	timer          *time.Timer
}

// init sets up the log from the pool's Config.
func (l *loanLog) init(cfg *Config, k *clock.Clock, r *reporter) {
	l.wanted = cfg.HoldWarn > 0 || cfg.Profile != nil || cfg.Debug
	l.warn, l.profile, l.clock, l.report = cfg.HoldWarn, cfg.Profile, k, r
}

// add adds a record. skip is the number of stack frames to leave out for the Profile.
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

// remove removes a record.
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
	if l.oldest == nil && l.timer != nil { // there is no timer if Profile.Add panicked before add made one
		l.timer.Stop()
	}
}

// unlist takes h off the list of records not yet reported. The caller holds mu.
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

// tell reports each connection that has been in use for HoldWarn, once, and restarts
// the timer for the next one.
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

// info returns h as a HeldInfo; the loan has lasted until now.
func (h *loanRecord) info(now clock.Instant) HeldInfo {
	info := HeldInfo{Addr: h.addr, ID: h.id, Held: now.Sub(h.since)}
	info.Place, info.Stack = h.stack.text()
	return info
}

// farEnough bounds the search for the longest loan: making an error must not walk over a
// hundred thousand connections.
const farEnough = 256

// loansOut lists the recorded loans (see recordLoan), longest first.
type loansOut struct {
	mu  sync.Mutex // guards all; nothing else happens under it
	all list.List  // of *loanRecord
}

func (o *loansOut) add(h *loanRecord) {
	o.mu.Lock()
	h.out = o.all.PushBack(h)
	o.mu.Unlock()
}

func (o *loansOut) remove(h *loanRecord) {
	o.mu.Lock()
	o.all.Remove(h.out)
	o.mu.Unlock()
}

// find returns the first loan that satisfies which, among the farEnough longest; nil if
// none does.
func (o *loansOut) find(which func(*loanRecord) bool) *loanRecord {
	o.mu.Lock()
	defer o.mu.Unlock()
	el := o.all.Front()
	for n := 0; el != nil && n < farEnough; n++ {
		if h := el.Value.(*loanRecord); which(h) {
			return h
		}
		el = el.Next()
	}
	return nil
}

// at lists up to n loans at addr, and counts the others.
func (o *loansOut) at(addr Addr, n int) (hs []*loanRecord, more int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for el := o.all.Front(); el != nil; el = el.Next() {
		if h := el.Value.(*loanRecord); h.addr != addr {
			continue
		} else if len(hs) < n {
			hs = append(hs, h)
		} else {
			more++
		}
	}
	return hs, more
}
