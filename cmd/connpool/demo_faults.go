package main

import (
	"sync"
	"time"
)

// fault is what the demo does to a server.
type fault uint8

const (
	cutIdle  fault = iota // idle connections are ended
	cutBusy               // connections with a request in flight are ended
	unasked               // bytes are sent that answer no request
	stopping              // the server stops, and ends all its connections
	down                  // from the beginning of stopping until it listens again
	numFaults
)

var faultNames = [numFaults]string{"idle connections cut", "busy connections cut", "connections sent unasked bytes", "servers stopped and started", "down"}

// faultLog records the faults of one server. With it an unavoidable error is told from a
// mistake of the pool.
//
// A fault that had ended at time t was visible to a check of the connection after t. So
// if the pool checked after t and a borrower still met the fault, the pool should have
// noticed it. A fault that was still going on at t, or began later, proves nothing,
// because it may have struck between the check and the use.
type faultLog struct {
	mu    sync.Mutex // guards the fields below; nothing is called under it
	now   [numFaults]int
	ended [numFaults]time.Time // zero: never happened
}

func (l *faultLog) begin(f fault) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now[f]++
}

func (l *faultLog) end(f fault) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now[f]--
	l.ended[f] = time.Now()
}

// during records f for as long as do runs.
func (l *faultLog) during(f fault, do func()) {
	l.begin(f)
	defer l.end(f)
	do()
}

// since reports whether any of the faults was going on at t or later. The zero time asks
// whether it ever happened.
func (l *faultLog) since(t time.Time, faults ...fault) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range faults {
		if l.now[f] > 0 || l.ended[f].After(t) {
			return true
		}
	}
	return false
}
