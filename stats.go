package connpool

import (
	"fmt"
	"time"
)

// Stats is a snapshot of a pool: gauges first, then counters. In every snapshot
// Open = Dialing + Idle + InUse + Closing.
//
// The counters balance: each dial ends in exactly one of DialErrors, Detached, or one
// reason in Closed. So at rest
//
//	Dials - DialErrors - Detached - (the sum of Closed) = Open
//
// This also holds after a failed Setup. A connection whose Setup failed had been opened,
// so it counts in Closed (usually ClosedSetupFailed) when its socket is closed, and not in
// DialErrors.
type Stats struct {
	Open      int // sockets that exist or are being made; what MaxOpen limits
	Dialing   int // being opened, or in Setup
	Idle      int // ready to be lent
	InUse     int // lent, or in Reset, Check or Push; the Tracked ones are among them
	Tracked   int // made by DialContext, and not closed yet
	Closing   int // given up, but not closed yet
	Waiting   int // borrowers in a queue
	Limit     int // MaxOpen in use; 0: none
	PeakOpen  int // the largest Open so far
	Addrs     int // addresses the pool keeps books for
	Unprobed  int // open connections whose liveness cannot be checked, see Prober
	Residents int // open connections whose client does the I/O, see Resident and Carry

	Loans            uint64        // loans that have ended
	Reused           uint64        // those of a connection that had been lent before
	Dials            uint64        // dials that were started
	DialErrors       uint64        // dials (with handshake) that failed or were given up because nobody needed them any more; failed Setups count in Closed
	Detached         uint64        // connections that left by Conn.Detach
	Leaked           uint64        // leases and sessions that became unreachable and were taken back
	Pushes           uint64        // calls of Config.Push
	AbandonedCalls   uint64        // foreign code given up because it did not end in time: dials, hooks, closes, observers, calls on a connection that its deadline or close did not end
	Waits            uint64        // borrowers that had to queue
	WaitDuration     time.Duration // time spent in queues
	SlotWaits        uint64        // those of Waits who joined a queue while no dial could start for them: they waited for a connection to come back, for a slot, or for the end of a back-off's pause; the others waited for a dial
	SlotWaitDuration time.Duration // the part of WaitDuration that these spent
	WaitsFailed      uint64        // borrowers that left the queue with an error, including the error of their own ctx
	Exhausted        uint64        // borrowers refused with ErrExhausted

	Closed map[CloseReason]uint64 // connections closed, by reason; reasons that never happened are absent
}

// String is one line for a log.
func (s Stats) String() string {
	return fmt.Sprintf("connpool: %d connections, %d in use, %d idle, %d dialing, %d closing, %d waiting; %d loans, %d reused, %d dials, %d failed",
		s.Open, s.InUse, s.Idle, s.Dialing, s.Closing, s.Waiting, s.Loans, s.Reused, s.Dials, s.DialErrors)
}

// AddrStats is the part of [Stats] that concerns one address. When the pool has had no
// connection, dial, waiter or failure for the address for a while, it forgets the
// address, and the counters start again from 0.
type AddrStats struct {
	Open, Dialing, Idle, InUse, Closing, Waiting int

	Loans, Dials uint64
	DialErrors   uint64 // with handshake and Setup

	BackingOff bool  // after repeated failures the next dial waits
	LastErr    error // error of the last failed dial, or of a new connection that the peer gave up; nil when the address works again; in JSON its text, 400 bytes at most
}
