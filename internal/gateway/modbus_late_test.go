package gateway

import (
	"bufio"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/short"
)

// units is a device that passes each request to answer, which may write anything at any
// time.
func units(answer func(p *faultnet.Peer, request []byte)) func(*faultnet.Peer) {
	return func(p *faultnet.Peer) {
		for {
			request := make([]byte, 6)
			if _, err := io.ReadFull(p, request); err != nil {
				return
			}
			request = append(request, make([]byte, request[5])...)
			if _, err := io.ReadFull(p, request[6:]); err != nil {
				return
			}
			answer(p, request)
		}
	}
}

// writeRegister is a request to set one register, and the reply to it.
func writeRegister(tid uint16, unit byte, register byte) []byte {
	b := readRegisters(tid, unit, uint16(register), 1)
	b[7] = 6
	return b
}

// TRY-32
func TestARequestWithoutAReplyHoldsTheLineForTheBroadcastWaitOnly(t *testing.T) {
	t.Parallel()
	several := []byte{0, 7, 0, 0, 0, 11, 0, 16, 0, 5, 0, 2, 4, 1, 2, 3, 4}
	for name, c := range map[string]struct {
		mute, told []byte
		silent     bool
	}{
		"a broadcast":                      {mute: writeRegister(7, 0, 5), told: writeRegister(7, 0, 5)},
		"a broadcast of several":           {mute: several, told: []byte{0, 7, 0, 0, 0, 6, 0, 16, 0, 5, 0, 2}},
		"a broadcast, and nothing is told": {mute: writeRegister(7, 0, 5), silent: true},
		"a broadcast that asks":            {mute: readRegisters(7, 0, 5, 1)},
		"listen only mode":                 {mute: []byte{0, 7, 0, 0, 0, 6, 3, 8, 0, 4, 0, 0}},
		"a broadcast of 8/4":               {mute: []byte{0, 7, 0, 0, 0, 6, 0, 8, 0, 4, 0, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			srv, to := serve(t, faultnet.Options{Handler: units(func(p *faultnet.Peer, b []byte) {
				if !mutely(b) {
					p.Write(b)
				}
			})})
			g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, RequestTimeout: forever, BroadcastWait: 50 * time.Millisecond, BroadcastSilent: c.silent})
			a, b := g.call(), g.call()
			for i := range uint16(5) {
				a.Write(c.mute)
				b.Write(writeRegister(i, 1, 9))
				require.Equal(t, writeRegister(i, 1, 9), b.hearFrame(), "long before -request-timeout")
				if c.told != nil {
					require.Equal(t, c.told, a.hearFrame())
				}
			}
			a.Write(writeRegister(8, 1, 9))
			require.Equal(t, writeRegister(8, 1, 9), a.hearFrame(), "it was told nothing else before")
			require.Equal(t, 1, srv.Accepts(), "the connection is kept")
			require.Empty(t, nonZero(g.Status().Failures))
			require.Equal(t, g.Status().Requests, g.Status().Replies)
		})
	}
}

// TRY-32: devices with a connection of their own do answer unit 0.
func TestADeviceThatAnswersABroadcastIsHeard(t *testing.T) {
	hold := make(chan bool)
	_, to := serve(t, faultnet.Options{Handler: units(func(p *faultnet.Peer, b []byte) {
		if b[9] == 99 {
			<-hold
		}
		p.Write(b)
	})})
	g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, BroadcastWait: 10 * time.Second})
	c := g.call()
	c.Write(writeRegister(7, 0, 5))
	require.Equal(t, writeRegister(7, 0, 5), c.hearFrame())

	// A reply that is too late belongs to no request.
	quick := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, BroadcastWait: 10 * time.Millisecond})
	c = quick.call()
	c.Write(writeRegister(7, 0, 99))
	require.Equal(t, writeRegister(7, 0, 99), c.hearFrame(), "the gateway's own, when its time is over")
	c.Write(writeRegister(8, 1, 5))
	close(hold)
	require.Equal(t, writeRegister(8, 1, 5), c.hearFrame())
	require.Empty(t, quick.Status().Pool.Closed)
}

// TRY-32
func TestALateModbusReplyIsDroppedAndCostsNoConnection(t *testing.T) {
	t.Parallel()
	rounds := short.Of[uint16](5, 2)
	for _, when := range []string{"while the next request waits", "while nobody asks"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			late := make(chan []byte, 1)
			var peer atomic.Pointer[faultnet.Peer]
			srv, to := serve(t, faultnet.Options{Handler: units(func(p *faultnet.Peer, b []byte) {
				peer.Store(p)
				if b[9] == 99 {
					late <- b
					return
				}
				select {
				case owed := <-late: // then the reply to the request
					p.Write(owed)
				default:
				}
				p.Write(b)
			})})
			g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, RequestTimeout: time.Second})
			for i := range rounds {
				c := g.call()
				c.Write(writeRegister(i, 1, 99))
				reply := c.hearFrame()
				require.Equal(t, byte(0x86), reply[7])
				require.Equal(t, byte(modbusNoResponse), reply[8], "it was not answered in time")
				if when == "while nobody asks" {
					peer.Load().Write(<-late)
				}
				d := g.call()
				d.Write(writeRegister(i, 1, 5))
				require.Equal(t, writeRegister(i, 1, 5), d.hearFrame(), "nobody gets the late one")
			}
			require.Equal(t, 1, srv.Accepts())
			require.Empty(t, g.Status().Pool.Closed)
			require.EqualValues(t, rounds, g.Status().Failures["late"])
		})
	}
}

// TRY-32: a device that is silent for good is dialled anew.
func TestADeviceThatIsSilentForGoodIsDialledAnew(t *testing.T) {
	t.Parallel()
	srv, to := serve(t, faultnet.Options{Handler: units(func(p *faultnet.Peer, b []byte) {
		if p.Serial() > 1 {
			p.Write(b)
		}
	})})
	g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, RequestTimeout: 500 * time.Millisecond})
	c := g.call()
	for range maxSilent {
		c.Write(writeRegister(1, 1, 5))
		require.Equal(t, byte(0x86), c.hearFrame()[7])
	}
	soon(t, "it is answered", func() bool { c.Write(writeRegister(1, 1, 5)); return c.hearFrame()[7] == 6 })
	require.Equal(t, 2, srv.Accepts())
}

// TRY-32: a reply that was not asked for, or was asked for on another connection, is an
// error.
func TestAReplyThatIsNotOwedCostsTheConnection(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(b []byte){
		"another number":   func(b []byte) { b[0] ^= 0x80 },
		"another unit":     func(b []byte) { b[6]++ },
		"another function": func(b []byte) { b[7] = 5 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var first atomic.Bool
			srv, to := serve(t, faultnet.Options{Handler: units(func(p *faultnet.Peer, b []byte) {
				if !first.CompareAndSwap(false, true) {
					p.Write(b)
					return
				}
				owed := append([]byte{}, b...)
				p.Read(make([]byte, 12)) // the next request; the first one was given up
				spoil(owed)
				p.Write(owed)
			})})
			g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, RequestTimeout: time.Second})
			c := g.call()
			for range 2 {
				c.Write(writeRegister(1, 1, 5))
				require.Equal(t, byte(0x86), c.hearFrame()[7])
			}
			require.EqualValues(t, 1, g.Status().Failures["out-of-step"])
			c.Write(writeRegister(1, 1, 5))
			require.Equal(t, writeRegister(1, 1, 5), c.hearFrame())
			require.Equal(t, 2, srv.Accepts())
		})
	}
}

// TRY-32: devices that never send the number of a request are served as long as they
// answer in time.
func TestADeviceThatSaysZeroIsBelievedUntilItIsLate(t *testing.T) {
	t.Parallel()
	srv, to := serve(t, faultnet.Options{Handler: units(func(p *faultnet.Peer, b []byte) {
		if b[9] != 99 {
			b[0], b[1] = 0, 0
			p.Write(b)
		}
	})})
	g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, RequestTimeout: 2 * time.Second})
	c := g.call()
	for i := range uint16(5) {
		c.Write(writeRegister(i, 1, 5))
		require.Equal(t, writeRegister(i, 1, 5), c.hearFrame())
	}
	require.Equal(t, 1, srv.Accepts())
	c.Write(writeRegister(7, 1, 99))
	require.Equal(t, byte(0x86), c.hearFrame()[7])
	c.Write(writeRegister(8, 1, 5))
	require.Equal(t, writeRegister(8, 1, 5), c.hearFrame())
	require.Equal(t, 2, srv.Accepts(), "what comes late could be anybody's")
}

// TRY-32
func TestSlowDevicesAreGivenTheirTime(t *testing.T) {
	t.Parallel()
	t.Run("-connect-delay", func(t *testing.T) {
		const pause = 100 * time.Millisecond
		_, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
			opened := time.Now()
			units(func(p *faultnet.Peer, b []byte) {
				if time.Since(opened) >= pause { // before that, it ignores input
					p.Write(b)
				}
			})(p)
		}})
		g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, ConnectDelay: pause + 50*time.Millisecond})
		c := g.call()
		c.Write(writeRegister(1, 1, 5))
		require.Equal(t, writeRegister(1, 1, 5), c.hearFrame())
	})
	t.Run("-redial-delay", func(t *testing.T) {
		const pause = 150 * time.Millisecond
		var last atomic.Int64 // when the last connection had ended, as the device sees it
		var tooEarly atomic.Int64
		srv, to := serve(t, faultnet.Options{Handler: func(p *faultnet.Peer) {
			if end := last.Load(); end != 0 && time.Since(time.Unix(0, end)) < pause {
				tooEarly.Add(1)
				return
			}
			buf := make([]byte, 12)
			for n := 0; ; n++ {
				if _, err := io.ReadFull(p, buf); err != nil {
					break
				}
				if n == 2 {
					p.Write([]byte("garbage that costs the connection"))
					continue
				}
				p.Write(buf)
			}
			last.Store(time.Now().UnixNano())
		}})
		g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, RedialDelay: 2 * pause})
		c := g.call()
		good := 0
		for range 12 {
			c.Write(writeRegister(1, 1, 5))
			if c.hearFrame()[7] == 6 {
				good++
			}
		}
		require.Equal(t, 8, good, "two of each three")
		require.Zero(t, tooEarly.Load())
		require.Equal(t, 4, srv.Accepts())
		require.NotZero(t, g.Status().Pool.Closed[connpool.ClosedFnError])
	})
}

// TRY-32: a device without numbers receives broadcasts as any other device does.
func TestABroadcastCostsADeviceWithoutNumbersNothing(t *testing.T) {
	p := protocols["modbus"]
	_, to := serve(t, faultnet.Options{Handler: func(peer *faultnet.Peer) {
		r := bufio.NewReader(peer)
		for {
			n, all, err := p.next(r)
			if err != nil {
				return
			}
			if all[6] != 0 {
				peer.Write(p.reply(n)) // with the id 0
			}
		}
	}})
	g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, BroadcastWait: 20 * time.Millisecond})
	c := g.call()
	for i := range 5 {
		c.Write(readRegisters(9, 0, 1, 1))
		c.Write(p.request(i))
		n, all, err := p.next(c.r)
		require.NoError(t, err)
		require.Equal(t, i, n, "%x", all)
	}
	require.EqualValues(t, 1, g.Status().Pool.Dials)
}

// TRY-32: the gateway waits for a device that reads nothing any more no longer than for
// one that does not answer.
func TestADeviceThatTakesNothingIsNotWaitedForWithoutEnd(t *testing.T) {
	t.Parallel()
	ours, device := net.Pipe()
	defer device.Close()
	defer ours.Close()
	time.AfterFunc(10*time.Second, func() { ours.Close() }) // for a gateway that waits
	u := &replies{sc: newMBAPScanner(), max: 1000}
	var out store
	answered := 0
	err := u.modbus(ours, writeRegister(7, 0, 5), &out, &answered, time.Now().Add(10*time.Millisecond), &Config{BroadcastWait: time.Millisecond})
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.Zero(t, answered, "it is not out")
	require.Empty(t, out.b)
}

// TRY-27: the gateway notices that a client has left even if the client gets no reply.
func TestNothingBehindASilentBroadcastIsCarriedOutForAClientThatLeft(t *testing.T) {
	if !canWatch {
		t.Skip("this system does not tell of clients that nobody reads from")
	}
	t.Parallel()
	var writes atomic.Int64
	out := make(chan bool, 1)
	_, to := serve(t, faultnet.Options{Handler: units(func(p *faultnet.Peer, b []byte) {
		if mutely(b) {
			out <- true
			return
		}
		writes.Add(1)
		p.Write(b)
	})})
	g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, BroadcastWait: 2 * time.Second, BroadcastSilent: true})
	c := g.call()
	c.Write(append(writeRegister(1, 0, 5), writeRegister(2, 1, 5)...))
	<-out
	c.leave(true)
	soon(t, "it is gone", func() bool { return g.Status().Clients == 0 })
	require.Zero(t, writes.Load())
}
