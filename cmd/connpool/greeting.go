package main

import (
	"context"
	"errors"
	"time"
)

// listenFor is how long a peer may take to say something unasked.
const listenFor = 250 * time.Millisecond

// listening watches, on a connection of its own beside a measurement, whether
// the peer speaks before it is asked: then a probe takes what the peer says by
// itself for the answer, and all figures are those of greetings. The returned
// ctx ends when it does. verdict waits for the look, and says what was heard.
func (t *target) listening(ctx context.Context) (during context.Context, verdict func() error) {
	if t.probe.marked || t.open != nil { // a network that was made up counts its connections
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
		case <-ctx.Done(): // interrupted, and so is the look
			cut()
			return <-heard
		}
	}
}

// listen returns an error if bytes come that were not asked for. Whatever else
// is wrong with the peer is for the measurement to tell.
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
	// A greeting may come late, even after the first question. Then something is
	// left over after the answer, and as much after the next; if it grows, the
	// answers are longer than the probe says.
	nc.SetReadDeadline(time.Time{})
	s, err := t.probe.begin(ctx, t.addr, nc)
	if err != nil {
		return nil
	}
	w := s.(*bytesSession) // that of each blind probe
	var left, whole [2]int // bytes, and answers in them
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
