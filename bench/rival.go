package bench

import (
	"context"
	"errors"
	"io"
	"net"
	"time"
)

// Rival is a way to get a connection. Many goroutines may call its methods at once,
// except those of the held connection, which has one user.
type Rival interface {
	// Loan borrows a connection to address number key and gives it back.
	Loan(ctx context.Context, key int) error

	// Exchange borrows a connection and does x over it. If that fails, the connection is
	// not used again.
	Exchange(ctx context.Context, key int, x *Exchange) error

	// Hold runs fn with a borrowed connection.
	Hold(ctx context.Context, key int, fn func(net.Conn) error) error

	Close() error
}

// ErrOwnProtocol is the error of Loan and Hold for clients that speak their own protocol
// and lend no connection.
var ErrOwnProtocol = errors.New("this rival lends no connection")

// Exchange is one request and its reply, which repeats it. It belongs to one
// goroutine.
type Exchange struct {
	Request []byte    // FrameSize bytes
	Stamp   bool      // set Lent
	Lent    time.Time // when the connection was there

	reply [FrameSize]byte
}

// FrameSize is the size of every request and reply.
const FrameSize = 64

var errForeignReply = errors.New("the reply is not that of the request")

// NewExchange makes an exchange whose request nobody else sends.
func NewExchange(tag int) *Exchange {
	x := &Exchange{Request: make([]byte, FrameSize)}
	for i := range x.Request {
		x.Request[i] = 'a' + byte(tag>>(i%16*2)&15)
	}
	return x
}

// exchange is generic because converting a connpool.Conn to an interface allocates, and a
// user of the pool would not convert it either.
func exchange[C io.ReadWriter](c C, x *Exchange) error {
	if x.Stamp {
		x.Lent = time.Now()
	}
	if _, err := c.Write(x.Request); err != nil {
		return err
	}
	for n := 0; n < FrameSize; {
		m, err := c.Read(x.reply[n:])
		if err != nil {
			return err
		}
		n += m
	}
	return x.verify()
}

func (x *Exchange) verify() error {
	if string(x.reply[:]) != string(x.Request) {
		return errForeignReply
	}
	return nil
}

// Rivals makes each of them, by name.
var Rivals = map[string]func(*Settings) Rival{
	"connpool": newConnpool,
	"puddle":   newPuddle,
	"sql":      newSQL,
	"commons":  newCommons,
	"redis":    newRedis,
	"http":     newHTTP,
	"channel":  newChannel,
	"stack":    newStack,
	"held":     newHeld,
	"shared":   newShared,
	"dial":     newDialed,
}
