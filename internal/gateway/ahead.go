package gateway

import (
	"sync/atomic"
	"time"
)

// aheadAfter is how long a write to a client may take before the gateway checks whether
// the client is writing too.
const aheadAfter = 20 * time.Millisecond

// ahead reads what a client sends while the client does not read its replies. A client
// may write all of a long pipeline before it reads a single reply; then only the gateway
// can resolve the deadlock. The bytes that ahead reads wait in the client's store, within
// -max-memory. Each client has one ahead and reuses it.
type ahead struct {
	cl      *client
	timer   *time.Timer
	done    chan struct{} // gets a value when the reading has ended
	stopped atomic.Bool
	scratch []byte // for bytes that are dropped
}

// begin is called before a write to the client, and end after the write. Between the two
// nobody else may touch the client's input.
func (a *ahead) begin(cl *client) {
	a.stopped.Store(false)
	if a.timer == nil {
		a.cl, a.done = cl, make(chan struct{}, 1)
		a.timer = time.AfterFunc(aheadAfter, a.read)
	} else {
		a.timer.Reset(aheadAfter)
	}
}

func (a *ahead) read() {
	defer func() { a.done <- struct{}{} }()
	cl := a.cl
	// end sets stopped before it sets its own deadline. So either end's deadline
	// overwrites this one, or the loop sees stopped.
	cl.conn.SetReadDeadline(time.Time{})
	for !a.stopped.Load() {
		switch err := cl.in.more(); err {
		case nil:
		case errNoMemory: // read on and drop the rest; otherwise the client would never come to read why it is refused
			cl.in.broken = err
			fallthrough
		case cl.in.broken:
			if a.scratch == nil {
				a.scratch = make([]byte, clientBuffer)
			}
			if _, err := cl.in.r.Read(a.scratch); err != nil {
				return
			}
		default: // the next reader finds the cause
			return
		}
		// A client that writes is alive, and will read its replies later.
		cl.conn.SetWriteDeadline(time.Now().Add(cl.g.WriteTimeout))
	}
}

func (a *ahead) end() {
	a.stopped.Store(true)
	if !a.timer.Stop() {
		a.cl.conn.SetReadDeadline(past)
		<-a.done
	}
}
