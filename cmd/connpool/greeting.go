package main

import (
	"context"
	"errors"
	"time"
)

// listenFor is how long a peer may take to send something unasked.
const listenFor = 250 * time.Millisecond

// listening watches, on a connection of its own beside a measurement, whether the peer
// speaks before it is asked. If so, a probe takes the unrequested bytes for the reply,
// and all figures are wrong. The returned ctx ends in that case. verdict waits for the
// result and returns it.
func (t *target) listening(ctx context.Context) (during context.Context, verdict func() error) {
	if t.probe.marked || t.open != nil { // a network made up by a test counts its connections
		return ctx, func() error { return nil }
	}
	during, cut := context.WithCancel(ctx)
	heard := make(chan error, 1)
	go func() {
		err := t.listen(during)
		if err != nil {
			cut()
		}
		heard <- err
	}()
	return during, func() error {
		defer cut()
		select {
		case err := <-heard:
			return err
		case <-ctx.Done(): // interrupted, together with the measurement
			cut()
			return <-heard
		}
	}
}

// listen returns an error if bytes come that were not asked for. The measurement itself
// reports other problems of the peer.
func (t *target) listen(ctx context.Context) error {
	dial, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	nc, err := t.connect(dial, nil)
	if err != nil {
		return nil
	}
	defer nc.Close()
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	unasked := make([]byte, 80)
	if nc.SetReadDeadline(time.Now().Add(listenFor)) != nil {
		return nil
	}
	n, err := nc.Read(unasked)
	switch {
	case n > 0:
		return t.speaksFirst(unasked[:n])
	case !isTimeout(err) || !t.probe.blind || ctx.Err() != nil:
		return nil
	}
	// A greeting may come late, even after the first request. Then bytes are left over
	// after the reply, and as many after the next. If the number grows, the replies are
	// longer than the probe assumes.
	nc.SetReadDeadline(time.Time{})
	s, err := t.probe.begin(ctx, t.addr, nc)
	if err != nil {
		return nil
	}
	w := s.(*bytesSession) // every blind probe has a bytesSession
	var left, whole [2]int // bytes, and whole replies in them
	var said []byte
	for i := range left {
		nc.SetDeadline(time.Now().Add(t.timeout))
		if more, err := s.exchange(); err != nil || !more {
			return nil
		}
		nc.SetReadDeadline(time.Now().Add(listenFor))
		w.Peek(w.Buffered() + 1)
		said, _ = w.Peek(w.Buffered())
		if left[i], whole[i] = len(said), w.answersIn(said); left[i] == 0 {
			return nil
		}
	}
	if left[0] == left[1] || whole[0] == whole[1] && whole[0] > 0 {
		return t.speaksFirst(shortened(said))
	}
	return nil
}

func (t *target) speaksFirst(said []byte) error {
	return unexpected("the server says %q without being asked: -probe %s would take that for an answer", said, t.probe.name)
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}
